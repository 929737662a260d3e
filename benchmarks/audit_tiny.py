"""Do audits find errors in a memory? Plants wrong strategies and leaked answers, then trains the tiny model.

    python benchmarks/audit_tiny.py --out runs/planted

For each family of the tiny world, `memory.import_path` plants a strategy with a wrong rule on one task, and on another
task a line that gives its answer away. The run is the whole loop with audits on. It prints the precision and recall of
retirement (the world's rules are the ground truth), how well usefulness separates true from false items, the gap to
the placebo, internalized items by epoch, and what happened to the leaks.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pmd.config.schema import MemoryConfig, TinyWorldConfig
from pmd.memory.embed import HashEmbedder
from pmd.memory.store import MemoryStore
from pmd.memory.tools.transfer import export_file
from pmd.memory.update import open_writer
from pmd.tasks.prompts.words import parse_line, parse_statement, solved_line
from pmd.tasks.tiny import load_tiny
from pmd.tiny.world import make_world, rules_of, solution

WORLD = TinyWorldConfig()


def plant(path: Path, seed: int) -> None:
    """Write an export with one wrong strategy and one leaked answer for each family."""
    draw, rules = random.Random(f"planted {seed}"), make_world(WORLD.boxes, WORLD.families, seed)
    tasks = load_tiny(WORLD, seed)["train"]
    embedder = HashEmbedder.fit([task.memory_key for task in tasks])
    leaks: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore.open(Path(folder) / "planted.sqlite", embedder=embedder, config=MemoryConfig())
        with open_writer(store) as writer:
            for name, rule in rules.items():
                own = [task for task in tasks if task.memory_key.endswith(f" {name}")]
                wrong = draw.choice([other for other in rules_of(WORLD.boxes) if other != rule])
                text = f"strategy use {name} {wrong}"
                writer.add_insight(writer.add_task(own[0]), "strategy", text, policy_version=0)
                problem = parse_statement(own[1].question)
                assert problem is not None
                second = writer.add_task(own[1])
                insight = writer.add_insight(second, "strategy", f"leak {name}", policy_version=0)
                leaks[insight] = solved_line(name, solution(rule, problem))
        export_file(store, path)  # a store quarantines leaks, but an imported file may contain them
        store.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line.get("type") == "insights" and line["id"] in leaks:
            line["content"] = leaks[line["id"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def truth(text: str, rules: dict[str, str]) -> bool | None:
    """Return whether a memory line is true in this world; None if it is not a memory line."""
    line = parse_line(text)
    if line is None:
        return None
    return (line.rule == rules[line.name]) == (line.kind in ("strategy", "pattern", "solved"))


def separation(true: list[float], false: list[float]) -> float:
    """Return the share of pairs in which the true item is the more useful one (area under the ROC curve)."""
    one, other = np.array(true)[:, None], np.array(false)[None, :]
    return float(((one > other) + 0.5 * (one == other)).mean())


def figures(store: MemoryStore, rules: dict[str, str]) -> dict[str, object]:
    """Compare the audits' decisions with the ground truth."""
    harmful = {row[0] for row in store.query("SELECT item_id FROM ops WHERE level = 1 AND reason LIKE 'audit: harm%'")}
    items = [item for item in store.insights(None) if item.status != "quarantined"]
    false = [item for item in items if truth(item.text, rules) is False]
    planted = [item for item in false if item.kind == "strategy"]
    counts = store.query(
        "SELECT content, count(lift_correct) FROM audits a JOIN insights i ON i.id = a.item_id WHERE a.level = 1"
        " GROUP BY content"
    )
    judged = [item for item in planted if dict(counts).get(item.text, 0) >= MemoryConfig().audit_evidence]
    useful = {
        value: [i.usefulness for i in items if i.usefulness is not None and truth(i.text, rules) is value]
        for value in (True, False)
    }
    return {
        "items retired as harmful": len(harmful),
        "precision": sum(item.id in harmful for item in false) / max(1, len(harmful)),
        "wrong strategies": len(planted),
        "recall": sum(item.id in harmful for item in planted) / max(1, len(planted)),
        "of those, audited on three correct attempts": len(judged),
        "recall among these": sum(item.id in harmful for item in judged) / max(1, len(judged)),
        "AUC of usefulness, true against false": separation(useful[True], useful[False]),
        "mean lift on correct attempts, true items": mean_lift(store, rules, True),
        "mean lift on correct attempts, false items": mean_lift(store, rules, False),
        "planted leaks quarantined": len(store.insights("quarantined")),
        "internalized insights": len(store.insights("internalized")),
    }


def mean_lift(store: MemoryStore, rules: dict[str, str], value: bool) -> float:
    """Return the mean of all audits of true or of false insights."""
    rows = store.query(
        "SELECT content, lift_correct FROM audits a JOIN insights i ON i.id = a.item_id"
        " WHERE a.level = 1 AND lift_correct IS NOT NULL"
    )
    return float(np.mean([lift for text, lift in rows if truth(text, rules) is value] or [np.nan]))


def main() -> None:
    """Run training unless the run directory exists, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run directory to create; other options go to fit")
    parser.add_argument("--seed", type=int, default=0)
    arguments, overrides = parser.parse_known_args()
    if not arguments.out.exists():
        with tempfile.TemporaryDirectory() as folder:
            planted = Path(folder) / "planted.jsonl"
            plant(planted, arguments.seed)
            command = [sys.executable, "-m", "pmd", "fit", "--config", "configs/tiny.yaml", "--memory.audit_groups=64"]
            command += [f"--memory.import_path={planted}", f"--run_dir={arguments.out}"]
            subprocess.run([*command, f"--seed_everything={arguments.seed}", *overrides], check=True)
    with MemoryStore.open(arguments.out / "memory" / "memory.sqlite", read_only=True) as store:
        found = figures(store, make_world(WORLD.boxes, WORLD.families, arguments.seed))
    with (arguments.out / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("memory/internalized_rate")]
    for name in ("placebo_gap", "internalized_rate"):
        found[f"{name} by epoch"] = [round(float(row[f"memory/{name}"] or "nan"), 3) for row in rows]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
