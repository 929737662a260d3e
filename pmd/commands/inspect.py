"""`python -m pmd inspect step RUN`: what the teacher saw and where it disagreed, for any rollout of a run.

Enters: a run directory with traces. Leaves: text for people: the teacher's prompt, the memory items in it, and the
divergence of every completion token with both policies' log-probs, in nats.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pmd.config_load import load_config
from pmd.errors import ConfigError
from pmd.run_dir import RunDir


def main(argv: list[str]) -> int:
    """Print one rollout of one step; return 0."""
    parser = argparse.ArgumentParser(prog="python -m pmd inspect", description="Look at one rollout of a run.")
    parser.add_argument("what", choices=["step"])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--step", type=int, help="optimizer step, counted from 0; default: the latest traced")
    parser.add_argument("--rollout", type=int, default=0, help="which rollout of the step, counted from 0")
    arguments = parser.parse_args(argv)

    from pmd.models.load import load_tokenizer
    from pmd.trace import read_trace, trace_path

    run_dir = RunDir(Path(arguments.run))
    paths = sorted(run_dir.traces.glob("step-*.jsonl.gz"))
    path = trace_path(run_dir.traces, arguments.step) if arguments.step is not None else (paths or [None])[-1]
    if path is None or not path.is_file():
        raise ConfigError(f"--step={arguments.step}: {run_dir.traces} holds {len(paths)} steps; check run and step.")
    records = list(read_trace(path))
    if not 0 <= arguments.rollout < len(records):
        raise ConfigError(f"--rollout={arguments.rollout} must be below {len(records)}, the rollouts of this step.")
    show(records[arguments.rollout], load_tokenizer(load_config([run_dir.config]).run.model), Console())
    return 0


def show(record: dict[str, Any], tokenizer: Any, console: Console) -> None:
    """Print one record."""
    console.rule(f"step {record['step']}, {record['rollout_id']}")
    facts = ("policy_version", "memory_generation", "reward", "status", "feedback", "advantage", "items_dropped")
    for name in facts:
        console.print(f"{name}: {record[name]}", markup=False)
    console.rule("student prompt")
    console.print(tokenizer.decode(record["student_prompt_ids"]), markup=False)
    console.rule("teacher prompt")
    console.print(tokenizer.decode(record["teacher_prompt_ids"]), markup=False)
    items = Table("id", "level", "kind", "similarity", "text", title="memory items in it")
    for item in record["memory"]:
        items.add_row(str(item["id"]), str(item["level"]), item["kind"], f"{item['similarity']:.2f}", item["text"])
    console.print(items)
    tokens = Table("token", "divergence", "student", "teacher", title="per token, nats")
    missing = [float("nan")] * len(record["completion_ids"])
    rows = zip(
        record["completion_ids"],
        record.get("per_token_divergence", missing),
        record["student_logprobs"],
        record.get("teacher_logprobs", missing),
        strict=True,
    )
    for token_id, divergence, student, teacher in rows:
        tokens.add_row(repr(tokenizer.decode([token_id])), f"{divergence:.4f}", f"{student:.3f}", f"{teacher:.3f}")
    console.print(tokens)
