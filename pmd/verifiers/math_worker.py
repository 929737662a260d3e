"""The helper process of `math.py`: one JSON question per line on stdin enters, one JSON reply per line leaves.

The kernel ends it, in the middle of C code too: at the deadline (SIGALRM), and as soon as the trainer is gone, however
that ended (SIGIO when the trainer's end of a pipe closes, on which nothing is ever written).
"""

import contextlib
import fcntl
import json
import logging
import os
import resource
import select
import signal
import sys
from typing import Any

from pmd.sandbox import kernel, landlock, rooms, seccomp

MEMORY_BYTES = 4 << 30


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Parse both sides and compare them."""
    from math_verify import parse
    from math_verify import verify as same

    gold = parse(question["gold"], parsing_timeout=0) or parse(f"${question['gold']}$", parsing_timeout=0)
    if not gold:
        return {"error": f"the task's own answer {question['gold']!r} is not mathematics"}
    given = parse(question["text"], parsing_timeout=0)
    correct = bool(given) and bool(same(gold, given, timeout_seconds=0))
    return {"correct": correct, "answer": str(given[-1]) if given else None}


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
