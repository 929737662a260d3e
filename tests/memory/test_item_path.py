"""One memory item, followed from the parsed reflection to the teacher's prompt: the files of pmd that it passes.

Behaviours, which are other items made from the insights of several tasks, are not followed: there is one task here.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from epochs import make_epoch

import pmd
from pmd.config.schema import MemoryConfig, ModelConfig, ReflectionConfig, TeacherConfig
from pmd.memory import ProceduralMemory, evolve_memory
from pmd.memory.reflect import abstract, reflect
from pmd.pretrained import load_tokenizer
from pmd.tasks.prompts.chat import ChatPrompts
from pmd.teacher import ContextBuilder
from pmd.types import Completion, Message, Rollout, Task, Verdict

PACKAGE = Path(pmd.__file__).parent
TEXT = "Units: check the unit of each term before adding."
REPLY = '[{"kind": "lesson", "title": "Units", "content": "check the unit of each term before adding."}]'
FILES = [
    "tasks/prompts/parsing.py",  # read from the model's reply
    "tasks/prompts/chat.py",  # the parser's caller; at the end, the prompt
    "memory/reflect.py",  # tied to its task and attempts
    "memory/__init__.py",
    "memory/update.py",  # checked for leaks and duplicates
    "memory/store.py",  # a row, and the row read back
    "memory/retrieve.py",  # ranked among the neighbours' items
    "teacher.py",  # fitted into the prompt's budget
]


@dataclass
class OneReply:
    """An engine that always writes the same."""

    policy_version: int = 0

    def generate(self, requests, sampling, role="student"):
        for position in range(len(requests)):
            yield position, Completion((1,), (0.0,), REPLY, "stop", 0)

    def sync(self, policy_version): ...
    def sleep(self): ...
    def wake(self): ...
    def close(self): ...


def holds(value: object, depth: int = 4) -> bool:
    """Whether a value is the item's text, contains it, or is a record or collection of one that does."""
    if isinstance(value, str):
        return TEXT in value
    if depth == 0 or isinstance(value, bytes | int | float | type | None):
        return False
    if isinstance(value, Mapping):
        return any(holds(part, depth - 1) for part in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return isinstance(value, Collection) and any(holds(part, depth - 1) for part in value)
    text = getattr(value, "text", None)
    return isinstance(text, str) and TEXT in text


def follow(act) -> list[str]:
    """Return the files of pmd whose functions take or return the item while `act` runs, in order."""
    passed: dict[str, None] = {}

    def watch(frame: FrameType, event: str, value: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(PACKAGE)):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names] if event == "call" else [value]
        if any(holds(each) for each in values):
            passed.setdefault(Path(code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(watch)
    try:
        act()
    finally:
        sys.setprofile(None)
    return list(passed)


def test_an_item_passes_eight_files_from_the_reflection_to_the_teachers_prompt(tmp_path):
    task = Task("t", (Message("user", "How long is it?"),), "exact", "train", "7", memory_key="length")
    tokenizer = load_tokenizer(ModelConfig(path="tiny_exam"))
    prompts, engine, config = ChatPrompts(tokenizer), OneReply(), ReflectionConfig()
    completion = Completion((1,), (0.0,), "7", "stop", 0)
    group = [Rollout("t#0", "g", "t", (), completion, Verdict(1.0, True, "ok", answer="7"))]
    memory = ProceduralMemory(tmp_path / "memory.sqlite", MemoryConfig(), ["length"], frozenset())
    rendered: list[tuple[int, ...]] = []

    def live() -> None:
        found = reflect(engine, {"t": task}, [group], prompts, config, "key", memory.known_insights)
        record = make_epoch(memory, {"t": task}, group, found.changes)
        evolve_memory(record, memory, lambda clusters: abstract(engine, clusters, prompts, config, "key"), 0)
        items = memory.retrieve(task, seed=0)
        builder = ContextBuilder(prompts, TeacherConfig(context="memory"), 768)
        rendered.append(builder.build(task, group, items, None, memory.generation, Random(0))[0].prompt_ids)

    passed = follow(live)
    assert TEXT in tokenizer.decode(rendered[0])
    assert sorted(passed) == sorted(FILES)
    assert len(passed) <= 8
    memory.close()
