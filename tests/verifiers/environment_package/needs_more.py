"""Tasksets that one reply cannot answer; `need` says why."""

import verifiers.v1 as vf


class InContainer(vf.Task[vf.TaskData]):
    NEEDS_CONTAINER = True

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return 1.0


class WithRuntime(vf.Task[vf.TaskData]):
    @vf.reward
    async def right(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0


class WithSetup(vf.Task[vf.TaskData]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        return None

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return 1.0


class WithoutReward(vf.Task[vf.TaskData]):
    pass


class WithoutPrompt(vf.Task[vf.TaskData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return 1.0


KINDS = {
    "container": InContainer,
    "runtime": WithRuntime,
    "setup": WithSetup,
    "reward": WithoutReward,
    "prompt": WithoutPrompt,
}


class NeedsMoreConfig(vf.TasksetConfig):
    need: str = "container"


class NeedsMore(vf.Taskset[vf.Task, NeedsMoreConfig]):
    def load(self):
        kind, prompt = KINDS[self.config.need], None if self.config.need == "prompt" else "What is 1 + 1?"
        return [kind(vf.TaskData(name=str(number), prompt=prompt), self.config.task) for number in range(20)]


__all__ = ["NeedsMore"]
