"""Summarises finished runs: a row per arm with mean and standard error over seeds, as a table, Markdown and a plot.

Methods that reflect generate more tokens from the same rollouts. So each row says what it cost, and each block of
trained arms is followed by another at equal tokens: for each seed, what the cheapest arm generated. There every arm has
its score on the validation tasks at that number, interpolated between its evaluations.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pmd.evaluation.costs import cost_of, count, scores_at
from pmd.evaluation.report import ELSEWHERE
from pmd.planning.sweep.grid import PlannedRun, row_label
from pmd.run_dir import RunDir

BASE = "base"
LAST = ("other domains", "with memory", "best (chosen on test)")  # quantities that come after the others
COSTS = ("tokens", "seconds")
AT_EQUAL_TOKENS = "at equal tokens"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its standard error (nan for a single seed)."""

    mean: float
    error: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {100 * self.error:.1f}"
        return "-" if math.isnan(self.mean) else f"{100 * self.mean:.1f}{error}"


@dataclass(frozen=True, slots=True)
class Row:
    """One arm with one choice on each axis, summarised over the seeds that finished."""

    block: str
    arm: str
    label: str
    num_seeds: int
    num_failed: int
    rollouts: int
    updates: int
    scores: Mapping[str, Mapping[int, float]]  # avg, pass@k, other domains, with memory, best (chosen on test); by seed
    tokens: float = 0.0  # generated in training by a run, reflections included; the mean over seeds
    seconds: float = 0.0  # of training, likewise
    device: str = "CPU"  # whose seconds
    best: bool = False  # the highest avg among the choices of its arm, if there are several

    @property
    def quantities(self) -> dict[str, Estimate]:
        """Each score, summarised over the seeds."""
        return {name: estimate(list(by_seed.values())) for name, by_seed in self.scores.items()}


def make_rows(runs: Sequence[PlannedRun]) -> list[Row]:
    """Summarise the finished runs. Each block begins with the policy before training, as evaluated by its first arm."""
    groups: dict[tuple[str, str, str], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.block, run.arm, row_label(run.arm, run.choices)), []).append(run)
    rows: list[Row] = []
    for (block, arm, label), own in groups.items():
        results = {run.seed: json.loads(run.results.read_text()) for run in own if run.results.is_file()}
        if own[0].command == "test":
            rows.append(_row(block, arm, label, results, "initial", len(own) - len(results)))
            continue
        if block not in [row.block for row in rows]:
            untrained = {seed: result for seed, result in results.items() if "initial" in result["phases"]}
            rows.append(_row(block, BASE, BASE, untrained, "initial", 0))
        rows.append(_row(block, arm, label, results, "last", len(own) - len(results)))
    rows = [_marked(row, rows) for row in rows]
    return [row for block in by_block(rows).values() for row in (*block, *_at_equal_tokens(block, groups))]


def print_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print the table, with a section for each block."""
    names = quantity_names(rows)
    title = f"{escape(title)}: test tasks, mean ± standard error over seeds, in percent"
    table = Table(title=title, caption=_effort(rows), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")  # it alone gives way in a narrow terminal
    for heading in [*names, *COSTS, "seeds"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for block, own in by_block(rows).items():
        table.add_section()
        if block:
            table.add_row(escape(block), style="italic")
        for row in own:
            cells = [str(row.quantities[name]) if name in row.quantities else "-" for name in names]
            seeds = str(row.num_seeds) + (f" of {row.num_seeds + row.num_failed}" if row.num_failed else "")
            name = f"  {escape(row.label)}{' *' if row.best else ''}"
            table.add_row(name, *cells, *cost_cells(row), seeds, style="bold" if row.best else None)
    console.print(table)
    if any(row.best for row in rows):
        console.print("* the highest avg among the choices of its arm")


def write_rows(rows: Sequence[Row], out: Path, title: str) -> None:
    """Write table.md, sweep.json and sweep.png to `out`."""
    names = quantity_names(rows)
    headings = [*names, *COSTS, "seeds"]
    lines = [_effort(rows), "", f"| method | {' | '.join(headings)} |", "|---|" + "---:|" * len(headings)]
    for block, own in by_block(rows).items():
        lines += [f"| *{block}* |" + " |" * len(headings)] if block else []
        for row in own:
            cells = [str(row.quantities[name]) if name in row.quantities else "-" for name in names]
            label = f"**{row.label}**" if row.best else row.label
            lines.append(f"| {label} | {' | '.join([*cells, *cost_cells(row), str(row.num_seeds)])} |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "sweep.json").write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    _draw(rows, out / "sweep.png", title)


def by_block(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each block."""
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(row.block, []).append(row)
    return blocks


def _effort(rows: Sequence[Row]) -> str:
    """Say what each run had, and what equal tokens are; a frozen policy has rollouts and no updates."""
    rollouts = sorted({row.rollouts for row in rows if row.rollouts})
    updates = sorted({row.updates for row in rows if row.updates})
    each = [" or ".join(f"{n:,}" for n in numbers) or "no" for numbers in (rollouts, updates)]
    tokens = (
        " At equal tokens: each seed at what its cheapest arm generated, interpolated between evaluations."
        if any(AT_EQUAL_TOKENS in row.block for row in rows)
        else ""
    )
    return f"{each[0]} rollouts and {each[1]} updates per run; the base policy is not trained.{tokens}"


def _row(block: str, arm: str, label: str, results: Mapping[int, Mapping[str, Any]], phase: str, failed: int) -> Row:
    collected: dict[str, dict[int, float]] = {}
    for seed, result in results.items():
        scores = result["phases"][phase]
        values = {"avg": scores["avg"]}
        values |= {f"pass@{k}": value for k, value in scores["pass_at"].items() if k != "1"}
        values["with memory"] = scores["memory_conditioned"]
        if result.get("memory"):  # a test with memory in the prompt: no other column may hold its score
            values = {"with memory": scores["avg"]}
        if elsewhere := result["phases"].get(phase + ELSEWHERE):
            values["other domains"] = elsewhere["domain_mean"]["avg"]
        if phase == "last" and result.get("selected_on") == "test" and "best" in result["phases"]:
            values["best (chosen on test)"] = result["phases"]["best"]["avg"]
        for name, value in values.items():
            if value is not None:
                collected.setdefault(name, {})[seed] = value
    trained = phase != "initial" and bool(results)
    costs = [cost for result in results.values() if trained and (cost := cost_of(result))]
    first = next(iter(results.values()), {})
    return Row(
        block=block,
        arm=arm,
        label=label,
        num_seeds=len(results),
        num_failed=failed,
        rollouts=first["rollouts"] if trained else 0,
        updates=first["updates"] if trained else 0,
        scores=collected,
        tokens=_mean([cost.tokens for cost in costs]),
        seconds=_mean([cost.seconds for cost in costs]),
        device=costs[0].device if costs else "CPU",
    )


def _at_equal_tokens(rows: Sequence[Row], groups: Mapping[tuple[str, str, str], Sequence[PlannedRun]]) -> list[Row]:
    """Return each trained arm of a block (its best choice) at the tokens of the cheapest arm, seed by seed."""
    chosen = [row for row in chosen_rows(rows) if row.tokens]
    finished = {
        row.label: [run for run in groups[row.block, row.arm, row.label] if run.results.is_file()] for row in chosen
    }
    budgets: dict[int, float] = {}
    for run in (run for own in finished.values() for run in own):
        tokens = _generated(run)
        budgets[run.seed] = min(tokens, budgets.get(run.seed, tokens))
    if len(chosen) < 2:
        return []
    equal = []
    for row in chosen:
        runs = finished[row.label]
        within = {run.seed: scores_at(RunDir(run.run_dir).read_metrics(), budgets[run.seed]) for run in runs}
        found = {seed: scores for seed, scores in within.items() if scores}
        names = dict.fromkeys(name for scores in found.values() for name in scores if name != "tokens")
        by_seed = {name: {seed: own[name] for seed, own in found.items() if name in own} for name in names}
        title = f"{row.block}: " if row.block else ""
        title += f"{AT_EQUAL_TOKENS} ({count(_mean(list(budgets.values())))}), validation tasks"
        tokens = _mean([scores["tokens"] for scores in found.values()])
        equal.append(Row(title, row.arm, row.label, len(found), len(runs) - len(found), 0, 0, by_seed, tokens))
    return equal


def _generated(run: PlannedRun) -> float:
    cost = cost_of(json.loads(run.results.read_text()))
    return cost.tokens if cost else 0.0


def cost_cells(row: Row) -> tuple[str, str]:
    """Return a row's generated tokens and seconds, as text."""
    seconds = f"{row.seconds:,.0f} {row.device}" if row.seconds else "-"
    return count(row.tokens) if row.tokens else "-", seconds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and the standard error over seeds; nan for a single seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def _marked(row: Row, rows: Sequence[Row]) -> Row:
    """Mark the row whose avg is the highest among several choices of one arm."""
    rivals = [r for r in rows if (r.block, r.arm) == (row.block, row.arm) and "avg" in r.quantities]
    if len(rivals) < 2 or row is not max(rivals, key=lambda r: r.quantities["avg"].mean):
        return row
    return Row(**{name: getattr(row, name) for name in Row.__slots__ if name != "best"}, best=True)


def chosen_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are drawn: of an arm with several choices, the best one only."""
    several = {(row.block, row.arm) for row in rows if row.best}
    return [row for row in rows if row.best or (row.block, row.arm) not in several]


def colours_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return the colour of each arm, the same in every picture of a sweep."""
    return {arm: f"C{number}" for number, arm in enumerate(dict.fromkeys(row.arm for row in chosen_rows(rows)))}


def quantity_names(rows: Sequence[Row]) -> list[str]:
    """Return the scores that rows have, in the order of the columns."""
    names = dict.fromkeys(name for row in rows for name in row.quantities)
    return sorted(names, key=lambda name: name in LAST)  # stable: those of LAST come after the others


def _plain(row: Row) -> dict[str, Any]:
    quantities = {
        name: {"mean": e.mean, "error": None if math.isnan(e.error) else e.error} for name, e in row.quantities.items()
    }
    return {name: getattr(row, name) for name in Row.__slots__} | {"quantities": quantities}


def _draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw one panel per quantity with grouped bars: a group per block, a bar per arm (its best choice)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    shown = chosen_rows(rows)
    arms = list(dict.fromkeys(row.arm for row in shown))
    names = [name for name in quantity_names(rows) if name not in LAST]
    if any("avg" not in row.quantities for row in rows if row.num_seeds):
        names.append("with memory")
    arms_of = {name: {row.arm for row in shown if name in row.quantities} for name in names}
    names = [name for name in names if len(arms_of[name]) > 1] or names  # one arm alone is compared with nothing
    drawn = {name: list(dict.fromkeys(row.block for row in shown if name in row.quantities)) for name in names}
    widths = [max(6, 2.6 * len(blocks)) for blocks in drawn.values()]
    figure, axes = plt.subplots(
        1, len(names), figsize=(sum(widths), 5), width_ratios=widths, layout="constrained", squeeze=False
    )
    width, colours = 0.85 / len(arms), colours_of(rows)
    for axis, (name, blocks) in zip(axes[0], drawn.items(), strict=True):
        for position, arm in enumerate(arms):
            own = [r for r in shown if r.arm == arm and name in r.quantities]
            places = [blocks.index(r.block) + (position - (len(arms) - 1) / 2) * width for r in own]
            heights = [100 * r.quantities[name].mean for r in own]
            errors = [0.0 if math.isnan(e := r.quantities[name].error) else 100 * e for r in own]
            axis.bar(places, heights, width, yerr=errors, capsize=2, color=colours[arm])
        memory = "memory in the prompt" if name == "with memory" else f"{name}, no memory in the prompt"
        axis.set(title=memory, ylabel="percent", xlim=(-0.5, len(blocks) - 0.5), ylim=(0, 102))
        axis.set_xticks(range(len(blocks)), [textwrap.fill(block, 30) for block in blocks])
        axis.grid(axis="y", alpha=0.3)
    drawn_arms = set().union(*(arms_of[name] for name in names))
    named = [Patch(color=colours[arm], label=arm) for arm in arms if arm in drawn_arms]
    figure.legend(handles=named, loc="outside lower center", ncols=min(len(named), int(sum(widths) // 2.8)))
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)
