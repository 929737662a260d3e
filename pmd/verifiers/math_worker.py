"""The helper process of `math.py`: one JSON question per line on stdin enters, one JSON reply per line leaves.

The kernel ends it, in the middle of C code too: at the deadline (SIGALRM), and as soon as the trainer is gone, however
that ended (SIGIO when the trainer's end of a pipe closes, on which nothing is ever written).
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from typing import Any

from pmd.verifiers.sandbox import kernel, landlock, rooms, seccomp

MEMORY_BYTES = 4 << 30
#: What marks mathematics in a text, or shows that there is more in it than mathematics.
MARK_OR_WORD = re.compile(r"\$|\\boxed|\\[(\[]|(?<!\S)(?!(?:and|or)\b)[A-Za-z]{2,}(?!\S)")
MOST_BARE = 1000  # characters
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
#: What math-verify reads as something else: 1 1/2 as 1, 1.5e3 as 1.5 e 3, 0.\\overline{3} as 0.
MIXED_NUMBER = re.compile(r"(?<![\d.,/])(\d+) +(\d+)/(\d+)(?![\d.,/])")
SCIENTIFIC = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.,{])")
REPEATING = re.compile(r"(?<![\d.,])(\d{1,30})\.(\d{0,30})\\overline\{(\d{1,30})\}")
#: A number below this is right to this share of itself; what is left of a sum that is zero lies below the second.
SMALL, NOISE = 1e-3, 1e-100


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Parse both sides and compare them; of several boxes with words between them the last one counts."""
    gold = read(question["gold"]) or _parse(f"${question['gold']}$")
    if not gold:
        return {"error": f"the task's own answer {question['gold']!r} is not mathematics"}
    given = read(question["text"])
    correct = given[-1:] == [question["gold"].strip()] or is_same(gold, given)
    if not correct and (box := last_box(question["text"])):
        given = _parse(box) or given
        correct = is_same(gold, given)
    return {"correct": correct, "answer": str(given[-1]) if given else None}


def is_same(gold: list[Any], given: list[Any]) -> bool:
    """Compare by math-verify, for which all numbers below its six or fifteen decimals are the same."""
    from math_verify import verify

    if not (given and verify(gold, given, timeout_seconds=0)):
        return False
    try:
        wanted, found = (complex(parts[0].evalf()) for parts in (gold, given))
    except Exception:  # no number; sympy raises anything
        return True
    return abs(wanted) > SMALL or abs(wanted - found) <= max(SMALL * abs(wanted), NOISE)


def read(text: str) -> list[Any]:
    """Parse a text. Mathematics without marks and words is read whole: math-verify alone takes 2\\sqrt{3} for 2."""
    bare = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text.strip())
    whole = _parse(f"${bare}$") if len(text) <= MOST_BARE and not MARK_OR_WORD.search(text) else []
    return whole if any(not isinstance(part, str) for part in whole) else _parse(text) or whole


def last_box(text: str) -> str:
    """Return the text from its last box on, if words other than `and` and `or` part it from the box before."""
    *_, before, last = ["", *text.split("\\boxed")]
    depth, words = 0, ""
    for at, character in enumerate(before):
        depth += (character == "{") - (character == "}")
        if depth == 0 and character == "}":
            words = before[at + 1 :]
            break
    between = {word.lower() for word in WORD.findall(words)}
    return f"\\boxed{last}" if between and not between & {"and", "or"} else ""


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    text = SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    return parse(REPEATING.sub(_as_fraction, text), parsing_timeout=0)


def _as_fraction(decimal: re.Match[str]) -> str:
    whole, first, repeated = decimal.groups()
    numerator = int(whole + first + repeated) - int(whole + first)
    return f"\\frac{{{numerator}}}{{{10 ** len(first) * (10 ** len(repeated) - 1)}}}"


def _shut_in() -> None:
    """Give up writing, the network and other processes where the kernel offers it: parsers see a model's words."""
    with contextlib.suppress(OSError, KeyError):
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(landlock.make_ruleset([sys.prefix, sys.base_prefix, *rooms.LIBRARIES], rooms.DEVICES))
        program = seccomp.build_filter(kernel.MACHINE)
        kernel.install_filter(seccomp.with_pid(program, seccomp.pid_offsets(program), os.getpid()))


def end_with(lifeline: int) -> None:
    """Have the kernel end this process when the last writing end of the pipe `lifeline` closes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO, signal.SIGALRM])
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before the kernel watched
        sys.exit()


def main() -> None:
    """Answer questions until stdin ends."""
    end_with(int(sys.argv[1]))
    import math_verify  # noqa: F401  # before the first deadline runs

    logging.disable(logging.WARNING)  # it warns with each answer that its own time-outs are off

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _shut_in()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a parser prints is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["deadline_s"])
        try:
            reply = answer(question)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
