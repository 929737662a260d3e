import itertools
import re

import verifiers.v1 as vf

QUESTION = "What is {a} + {b}?\nA: {wrong}\nB: {right}\nC: {more}\nPut the letter between <answer> and </answer>."


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        found = re.search(r"<answer>\s*(\w+)\s*</answer>", trace.last_reply)
        return float(found is not None and found[1] == self.data.answer)

    @vf.reward(weight=0.1)
    async def brief(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 120)

    @vf.metric
    async def num_turns(self, trace: vf.Trace) -> float:
        return trace.num_turns


class SumConfig(vf.TasksetConfig):
    first: int = 0
    count: int = 40  # 0: without end
    named: bool = True


class SmallSumsTaskset(vf.Taskset[SumTask, SumConfig]):
    """The right option is always B, which a model can learn without learning to add."""

    def load(self):
        for number in itertools.count(self.config.first):
            if self.config.count and number == self.config.first + self.config.count:
                return
            a, b = number % 10 + 1, number // 10 + 1
            prompt = QUESTION.format(a=a, b=b, wrong=a + b - 1, right=a + b, more=a + b + 1)
            name = f"sum-{number}" if self.config.named else None
            yield SumTask(SumData(name=name, prompt=prompt, answer="B"), self.config.task)

    @property
    def bounded(self) -> bool:
        return self._bounded if self._bounded is not None else self.config.count > 0
