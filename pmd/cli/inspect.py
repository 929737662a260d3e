"""`python -m pmd inspect step RUN`: shows a rollout's teacher prompt, and the tokens where the teacher disagreed."""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pmd.cli import inspect_prompts
from pmd.cli.arguments import make_parser
from pmd.cli.printable import printable
from pmd.config.load import load_config
from pmd.errors import ConfigError
from pmd.run_dir import open_run

DESCRIPTION = """Show one rollout of one training step.

  python -m pmd inspect step runs/tiny                          the first rollout of the latest step
  python -m pmd inspect step runs/tiny --step 40 --list         one line for each rollout of step 40
  python -m pmd inspect step runs/tiny --step 40 --rollout 3

Prints the verdict, the student's prompt, the teacher's prompt, the memory items in it and, for every token of the
completion, the divergence between student and teacher in nats and the probability that each gave to the token.

  python -m pmd inspect prompts --config configs/tiny.yaml      all prompts of a task, before a run (prompts --help)"""
BAR = 10  # characters of the longest divergence bar
SAME = 0.01  # tokens below this fraction of the largest divergence are grouped on one line
LIST_COLUMNS = ("reward", "verdict", "tokens", "items", "shown", "nats")
LEVELS = {0: "experience", 1: "insight", 2: "behaviour"}


def main(argv: list[str]) -> int:
    """Print one rollout of one step, or a list of the step's rollouts; return 0."""
    if argv[:1] == ["prompts"]:
        return inspect_prompts.main(argv[1:])
    arguments = _parser().parse_args(argv)
    run_dir = open_run(arguments.run)
    kept = {int(path.name[5:11]): path for path in sorted(run_dir.traces.glob("step-*.jsonl.gz"))}
    if not kept:
        raise ConfigError(f"run={arguments.run} has no step in traces/; train with trace_every of at least 1.")
    step = max(kept) if arguments.step is None else arguments.step
    if step not in kept:
        raise ConfigError(f"--step={step} has no trace; use one of {_ranges(sorted(kept))}.")
    config = load_config([run_dir.config]).run.model

    from pmd.pretrained import load_tokenizer
    from pmd.trace import read_trace

    records, console = list(read_trace(kept[step])), Console()
    if arguments.list:
        list_rollouts(records, console)
        return 0
    if not 0 <= arguments.rollout < len(records):
        raise ConfigError(f"--rollout={arguments.rollout} must be from 0 to {len(records) - 1}; --list shows them.")
    record = records[arguments.rollout]
    place = f"step {step} (epoch {record['epoch']}), rollout {arguments.rollout} of {len(records)}"
    show(record, place, load_tokenizer(config), console, every_token=arguments.every_token)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("inspect", DESCRIPTION)
    parser.add_argument("what", choices=["step", "prompts"])
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--step", type=int, help="optimizer step, from 0 (default: the latest with a trace)")
    parser.add_argument("--rollout", type=int, default=0, help="number of the rollout in the step, from 0")
    parser.add_argument("--every-token", action="store_true", help="give every token a line of its own")
    parser.add_argument("--list", action="store_true", help="one line for each rollout of the step")
    return parser


def list_rollouts(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one line for each rollout; in 80 columns, only ids of more than 26 characters are folded."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("task", overflow="fold")
    for name, justify in zip(LIST_COLUMNS, ("right", "left", "right", "right", "left", "right"), strict=True):
        table.add_column(name, justify=justify, no_wrap=True)
    for number, record in enumerate(records):
        divergence = record.get("per_token_divergence")
        table.add_row(
            str(number),
            Text(printable(str(record["task_id"]))),
            f"{record['reward']:g}",
            Text(printable(str(record["status"]))),
            str(len(record["completion_ids"])),
            str(len(record["memory"])),
            _shown_briefly(record),
            "-" if divergence is None else f"{sum(divergence) / len(divergence):.3f}",
        )
    console.print(table)
    console.print(
        "items: memory items in the teacher's prompt; shown: the attempt beside them; nats: divergence per token",
        style="dim",
    )


def show(record: dict[str, Any], place: str, tokenizer: Any, console: Console, *, every_token: bool) -> None:
    """Print one record; adjacent tokens on which both policies agree share a line unless `every_token`."""
    _heading(console, place)
    facts = {
        "task": record["task_id"],
        "verdict": f"{record['status']}, reward {record['reward']:g}" + _in_brackets(record["feedback"]),
        "advantage": f"{record['advantage']:+.3f}",
        "completion": f"{len(record['completion_ids'])} tokens, ended by {record['finish_reason']}",
        "sampled by": f"policy version {record['policy_version']}",
        "memory": f"generation {record['memory_generation']}, {len(record['memory'])} items shown"
        + (f", {record['items_dropped']} dropped to fit" if record["items_dropped"] else ""),
        "also shown": _shown_attempt(record),
    }
    if record.get("explanation"):  # missing in traces of earlier versions
        facts = facts | {"explanation": record["explanation"]}
    for name, value in facts.items():
        console.print(printable(f"{name:>11}  {value}"), markup=False, highlight=False, soft_wrap=True)
    for heading, key in (("student's prompt", "student_prompt_ids"), ("teacher's prompt", "teacher_prompt_ids")):
        same = key == "teacher_prompt_ids" and record[key] == record["student_prompt_ids"]
        text = "the same as the student's: there was nothing to show" if same else tokenizer.decode(record[key])
        _heading(console, f"{heading}, {len(record[key])} tokens")
        console.print(printable(text.strip("\n")), markup=False, highlight=False, soft_wrap=True)
    _show_memory(record["memory"], console)
    _heading(console, "completion")
    console.print(printable(tokenizer.decode(record["completion_ids"])), markup=False, highlight=False, soft_wrap=True)
    _show_tokens(record, tokenizer, console, 0.0 if every_token else SAME)


def _show_memory(items: Sequence[dict[str, Any]], console: Console) -> None:
    _heading(console, f"memory items in the teacher's prompt: {len(items)}")
    for number, item in enumerate(items, start=1):
        kind = item["kind"] if item["kind"] == LEVELS[item["level"]] else f"{LEVELS[item['level']]}: {item['kind']}"
        heading = f"{number}. [{kind}] id {item['id']}, similarity {item['similarity']:.2f}"
        console.print(printable(heading), markup=False)
        console.print(Text(printable(item["text"])), soft_wrap=True)


def _show_tokens(record: dict[str, Any], tokenizer: Any, console: Console, same: float) -> None:
    """Print the table of tokens; adjacent tokens below `same` times the largest divergence share a line."""
    divergences, teacher = record.get("per_token_divergence"), record.get("teacher_logprobs")
    if divergences is None or teacher is None:
        _heading(console, "per token")
        console.print("this run has no teacher (objective.distillation=0), so there is nothing to compare")
        return
    mean, largest = sum(divergences) / len(divergences), max(divergences)
    _heading(console, f"per token: divergence {mean:.4f} nats on average, {largest:.4f} at most")
    table = Table(box=None, pad_edge=False)
    widths = {"#": 7, "token": max(16, console.width - BAR - 53), "nats": 7, "": BAR, "student": 7, "teacher": 7}
    for name, width in widths.items():
        table.add_column(name, justify="left" if name in ("token", "") else "right", width=width, no_wrap=True)
    table.add_column("the teacher", no_wrap=True)
    ids, student = record["completion_ids"], record["student_logprobs"]
    for start, end in _stretches(divergences, same * largest):
        text, nats = printable(repr(tokenizer.decode(ids[start:end]))), sum(divergences[start:end])
        if end - start > 1:
            table.add_row(f"{start}-{end - 1}", Text(text, overflow="ellipsis", no_wrap=True), f"{nats:.4f}")
            continue
        bar = "█" * round(BAR * nats / largest) if largest > 0 else ""
        ratio = teacher[start] - student[start]
        stance = "favours it" if ratio > 0.5 else "opposes it" if ratio < -0.5 else ""
        table.add_row(
            str(start), Text(text), f"{nats:.4f}", bar, _percent(student[start]), _percent(teacher[start]), stance
        )
    console.print(table)
    console.print(
        "student and teacher: the probability that each gave to the token; the teacher favours or opposes it where "
        "their log-probabilities differ by more than 0.5 nats",
        style="dim",
    )


def _stretches(divergences: Sequence[float], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield (start, end) ranges: single tokens, and maximal runs of tokens below `threshold`."""
    start = 0
    for end in range(1, len(divergences) + 1):
        is_last = end == len(divergences)
        if is_last or divergences[end] >= threshold or divergences[end - 1] >= threshold:
            yield start, end
            start = end


def _shown_attempt(record: dict[str, Any]) -> str:
    if record["success_shown"]:
        return "a success"
    if record.get("attempt_dropped"):  # missing in traces of earlier versions
        return "no attempt: it is too long for teacher.max_prompt_tokens"
    return "its own failure" if record["failure_shown"] else "no attempt"


def _shown_briefly(record: dict[str, Any]) -> str:
    if record["success_shown"]:
        return "success"
    return "too long" if record.get("attempt_dropped") else "failure" if record["failure_shown"] else "-"


def _percent(logprob: float) -> str:
    probability = 100 * math.exp(logprob)
    return f"{probability:.1f} %" if probability >= 0.1 else "< 0.1 %"


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(Text(text, style="bold"), align="left")


def _ranges(numbers: Sequence[int]) -> str:
    """Write 0, 1, 2, 5 as `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
