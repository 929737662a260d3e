"""A small world of named families, each bound to one rule, like the tiny world but without any model."""

import multiprocessing
import os
import random
import sqlite3
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from pmd.memory.embed import HashEmbedder
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer
from pmd.types import Completion, Message, Rollout, Task, Verdict

BOXES = ("red", "blue", "green", "gold")
RULES = [f"{first}>{second}" for first in BOXES for second in BOXES if first != second]


class World:
    """Named families of 6 training tasks each."""

    def __init__(self, seed: int = 0, families: int = 32):
        self.random = random.Random(seed)
        letters = "bcdfghklmnprstvz"
        self.names = [a + vowel + b for a, vowel, b in zip(letters * 2, "ao" * 16, "zxk" * 11, strict=False)][:families]
        assert len(set(self.names)) == families <= 32
        self.rule = {name: self.random.choice(RULES) for name in self.names}
        self.tasks = [self.task(f"{name}-{i}", name) for name in self.names for i in range(6)]

    def key(self, name: str) -> str:
        digits = self.random.sample(range(10), 4)
        return " ".join(f"{box} {digit}" for box, digit in zip(BOXES, digits, strict=True)) + f" {name}"

    def task(self, task_id: str, name: str, split: str = "train") -> Task:
        key = self.key(name)
        return Task(task_id, (Message("user", f"task {key}"),), "boxes", split, answer="3 7", memory_key=key)  # type: ignore[arg-type]

    def embedder(self) -> HashEmbedder:
        return HashEmbedder.fit([task.memory_key for task in self.tasks])

    def write_epoch(self, store: MemoryStore, epoch: int, attempts: int = 4) -> None:
        """Random attempts at every task, and what they teach."""
        draws = random.Random(epoch)
        with open_writer(store) as writer:
            for task in self.tasks:
                name = task.memory_key.split()[-1]
                task_row = writer.add_task(task)
                for attempt in range(attempts):
                    rule = draws.choice(RULES)
                    right = rule == self.rule[name]
                    rollout = make_rollout(task.task_id, f"{rule} ; {attempt}", correct=right, answer=rule)
                    parent = writer.add_experience(task_row, rollout, epoch)
                    kind, text = ("strategy", f"use {name} {rule}") if right else ("lesson", f"not {name} {rule}")
                    writer.add_insight(
                        task_row, kind, text, policy_version=epoch, parents=[parent] if parent is not None else []
                    )
            changes = [cluster.change(cluster.insights[0].text) for cluster in writer.clusters()]
            writer.replace_behaviours(changes, policy_version=epoch)


def make_rollout(
    task_id: str = "t", text: str = "red>gold ; red 3 gold 7", *, correct: bool = True, answer: str | None = None,
    feedback: str = "", status: str | None = None, reward: float | None = None,
) -> Rollout:  # fmt: skip
    verdict = Verdict(
        float(correct) if reward is None else reward,
        correct,
        status or ("ok" if correct else "wrong_answer"),  # type: ignore[arg-type]
        feedback,
        answer,
    )
    return Rollout(
        f"r-{task_id}", f"g-{task_id}", task_id, (1,), Completion((1, 2), (0.0, 0.0), text, "stop", 0), verdict
    )


def make_task(task_id: str = "t", split: str = "train", key: str = "", answer: str = "") -> Task:
    return Task(task_id, (Message("user", f"question {task_id}"),), "exact", split, answer=answer, memory_key=key)  # type: ignore[arg-type]


def start_process(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a process that may be killed, forked from a server that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory_world", "pmd.memory.index", "pmd.memory.update"])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def leave_a_log(path: Path, epoch: int, families: int = 32) -> Path:
    """Write an epoch while a reader is in the way, and die; return the write-ahead log, which alone holds the epoch."""
    process = start_process(_write_and_die, str(path), epoch, families)
    process.join()
    assert process.exitcode == 9
    log = path.with_name(f"{path.name}-wal")
    assert log.stat().st_size > 0
    return log


def killed_at(path: Path, statement: str, epoch: int, families: int = 32) -> None:
    """Write an epoch in a process that is killed as SQLite begins the first statement that starts so."""
    process = start_process(_die_at, str(path), statement, epoch, families)
    process.join()
    assert process.exitcode == 9


def _die_at(path: str, statement: str, epoch: int, families: int) -> None:
    world = World(families=families)
    store = MemoryStore.open(path, embedder=world.embedder())
    store.db.set_trace_callback(lambda sql: os._exit(9) if sql.startswith(statement) else None)
    world.write_epoch(store, epoch)


def _write_and_die(path: str, epoch: int, families: int) -> None:
    world = World(families=families)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM tasks").fetchall()
    world.write_epoch(MemoryStore.open(path, embedder=world.embedder()), epoch)
    os._exit(9)
