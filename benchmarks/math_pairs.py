"""Precision and recall of the mathematics verifier beside plain math-verify, on pairs whose truth is known.

python benchmarks/math_pairs.py [--wrong]

The pairs are those of tests/verifiers/math_pairs.py. math-verify is called as its README says: both texts are parsed
with the default settings, the task's answer between dollar signs, then `verify(gold, answer)`. It knows no `<answer>`
tag, so an answer in one is given to it in a box. Its time limits are 30 s instead of 5 s, for a machine that is busy.
"""

import argparse
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pmd.types import Message, Task
from pmd.verifiers.exact import tagged_answer
from pmd.verifiers.math import verify_math

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "verifiers"))
from math_pairs import Pair, all_pairs

LIMIT_S = 30


class Outcome(NamedTuple):
    """What both verifiers said about one pair."""

    pair: Pair
    ours: bool
    theirs: bool


def ours(pair: Pair) -> bool:
    return verify_math(Task("t", (Message("user", "Q?"),), "math", "test", answer=pair.gold), pair.completion).correct


def theirs(pair: Pair) -> bool:
    from math_verify import parse, verify

    completion = pair.completion
    if "<answer>" in completion:
        completion = f"\\boxed{{{tagged_answer(completion)}}}"
    gold = parse(f"${pair.gold}$", parsing_timeout=LIMIT_S)
    return verify(gold, parse(completion, parsing_timeout=LIMIT_S), timeout_seconds=LIMIT_S)


def shares(said: list[tuple[bool, bool]]) -> list[str]:
    """Return precision, recall and the number of wrong answers accepted, from (correct, accepted)."""
    accepted = sum(said_so for _, said_so in said)
    found = sum(correct and said_so for correct, said_so in said)
    right = sum(correct for correct, _ in said)
    return [_percent(found, accepted), _percent(found, right), str(accepted - found)]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrong", action="store_true", help="list the pairs that the verifier judges wrongly")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify reports its time-outs
    mine = [ours(pair) for pair in all_pairs()]
    outcomes = [Outcome(pair, mine[number], theirs(pair)) for number, pair in enumerate(all_pairs())]
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.pair.kind].append(outcome)
    table = Table(
        "kind", "right", "wrong", "precision", "recall", "wrongly accepted", "its precision", "recall", "accepted"
    )
    for kind, found in [*by_kind.items(), ("all", outcomes)]:
        right = sum(one.pair.correct for one in found)
        columns = shares([(one.pair.correct, one.ours) for one in found])
        columns += shares([(one.pair.correct, one.theirs) for one in found])
        table.add_row(kind, str(right), str(len(found) - right), *columns, end_section=kind == list(by_kind)[-1])
    Console(width=120).print(table)
    print("The last three columns are math-verify's.")
    for one in outcomes if options.wrong else []:
        if one.ours != one.pair.correct:
            print(one)


if __name__ == "__main__":
    main()
