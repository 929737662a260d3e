"""Do audits find what is wrong in a memory? Wrong strategies and leaked answers are planted; the tiny run goes on.

    python benchmarks/audit_tiny.py --out runs/planted

For each family of the tiny world a strategy with a wrong rule is planted on one problem, and on another a line that
gives its answer away, through `memory.import_path`. The run is the whole loop with audits on. Printed at the end:
precision and recall of retirement (an item is wrong if the world says so), how far usefulness separates true from
false items, the gap to the placebo, absorbed items by epoch, what became of the leaks.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from pmd.config import MemoryConfig, TinyWorldConfig
from pmd.memory.embed import HashEmbedder
from pmd.memory.store import MemoryStore
from pmd.memory.transfer import export_file
from pmd.tasks.tiny import load_tiny
from pmd.tiny.language import parse_line, solved_line
from pmd.tiny.world import make_world, rules_of, solution
from pmd.tiny.language import parse_statement

LEAK = "solved"


def plant(path: Path, seed: int) -> None:
    """Write an export with one wrong strategy and one leaked answer for each family."""
    world, draw = TinyWorldConfig(), random.Random(f"planted {seed}")
    rules = make_world(world.boxes, world.families, seed)
    tasks = load_tiny(world, seed)["train"]
    embedder = HashEmbedder.fit([task.memory_key for task in tasks])
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore.open(Path(folder) / "planted.sqlite", embedder=embedder, config=MemoryConfig())
        with store.update() as writer:
            for name, rule in rules.items():
                own = [task for task in tasks if task.memory_key.endswith(f" {name}")]
                wrong = draw.choice([other for other in rules_of(world.boxes) if other != rule])
                writer.add_insight(writer.add_problem(own[0]), "strategy", f"strategy use {name} {wrong}", policy_version=0)
                problem = parse_statement(own[1].question)
                assert problem is not None
                leak = solved_line(name, solution(rule, problem))
                writer.add_insight(writer.add_problem(own[1]), "strategy", leak, policy_version=0)
        export_file(store, path)
        store.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def truth(text: str, rules: dict[str, str]) -> bool | None:
    """Say whether a line is true in this world; None where it is no such line."""
    line = parse_line(text)
    if line is None:
        return None
    return (line.rule == rules[line.name]) == (line.kind in ("strategy", "pattern", "solved"))
