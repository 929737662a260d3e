"""The helper process of `math.py`: reads one JSON question per line from stdin and answers each with a JSON line.

The kernel ends it even in the middle of C code: at the deadline (SIGALRM), and as soon as the trainer is gone for any
reason (SIGIO when the trainer's end of a pipe closes; nothing is ever written to that pipe).
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

from pmd.verifiers.sandbox import filesystem, kernel, landlock, seccomp

MEMORY_BYTES = 4 << 30
#: Math delimiters, or a word: either means that the text is not bare mathematics.
MARK_OR_WORD = re.compile(r"\$|\\boxed|\\[(\[]|(?<!\S)(?!(?:and|or)\b)[A-Za-z]{2,}(?!\S)")
MAX_BARE = 1000  # characters
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
#: Numbers that math-verify misreads: 1 1/2 as 1, 1.5e3 as 1.5 e 3, 0.\\overline{3} as 0.
MIXED_NUMBER = re.compile(r"(?<![\d.,/])(\d+) +(\d+)/(\d+)(?![\d.,/])")
SCIENTIFIC = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.,{])")
REPEATING = re.compile(r"(?<![\d.,])(\d{1,30})\.(\d{0,30})\\overline\{(\d{1,30})\}")
#: Numbers below SMALL must agree to this relative error; a sum that cancels to zero may leave a residue below NOISE.
SMALL, NOISE = 1e-3, 1e-100


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Parse both sides and compare them; of several boxes separated by words the last one counts."""
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
    """Compare by math-verify, then small numbers again: it rounds to six or fifteen decimals."""
    from math_verify import verify

    if not (given and verify(gold, given, timeout_seconds=0)):
        return False
    try:
        wanted, found = (complex(parts[0].evalf()) for parts in (gold, given))
    except Exception:  # not a number; sympy may raise anything
        return True
    return abs(wanted) > SMALL or abs(wanted - found) <= max(SMALL * abs(wanted), NOISE)


def read(text: str) -> list[Any]:
    """Parse a text. Bare mathematics is parsed whole, because math-verify alone reads 2\\sqrt{3} as 2."""
    bare = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text.strip())
    whole = _parse(f"${bare}$") if len(text) <= MAX_BARE and not MARK_OR_WORD.search(text) else []
    return whole if any(not isinstance(part, str) for part in whole) else _parse(text) or whole


def last_box(text: str) -> str:
    """Return the text from its last box on if words separate it from the box before; `and` and `or` do not count."""
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


def _restrict_itself() -> None:
    """Give up file writes, network and other processes where the kernel allows it: the input is untrusted."""
    with contextlib.suppress(OSError, KeyError):
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(
            landlock.make_ruleset([sys.prefix, sys.base_prefix, *filesystem.LIBRARIES], filesystem.DEVICES)
        )
        program = seccomp.build_filter(kernel.MACHINE)
        kernel.install_filter(seccomp.with_pid(program, seccomp.pid_offsets(program), os.getpid()))


def end_with(lifeline: int) -> None:
    """Have the kernel end this process when the last write end of the pipe `lifeline` closes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO, signal.SIGALRM])
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before the kernel was watching
        sys.exit()


def main() -> None:
    """Answer questions until stdin ends."""
    end_with(int(sys.argv[1]))
    import math_verify  # noqa: F401  # imported before the first deadline starts

    logging.disable(logging.WARNING)  # math-verify warns on every answer that its own time-outs are off

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _restrict_itself()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies, sys.stdout = sys.stdout, sys.stderr  # what a parser prints must not look like a reply
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
