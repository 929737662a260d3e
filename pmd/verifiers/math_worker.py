"""The helper process of `math.py`: reads one JSON question per line from stdin and answers each with a JSON line.

The kernel ends it even in the middle of C code: when a question has used its processor time (SIGPROF), and as soon as
the trainer is gone for any reason (SIGIO when its end of a pipe closes; nothing is ever written to that pipe).
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
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from pmd.verifiers.mathematics.judge import gold_problem, judge
from pmd.verifiers.sandbox import filesystem, kernel, landlock, seccomp

MEMORY_BYTES = 4 << 30
MAX_DIGITS = 50_000  # of an integer that is read
#: Imported only when a question needs them.
LATE_PACKAGES = ("sympy", "mpmath", "latex2sympy2_extended", "antlr4")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Judge one completion, or say of each of several tasks' answers why it cannot be judged."""
    if "golds" in question:
        return {"problems": [gold_problem(gold) for gold in question["golds"]]}
    return asdict(judge(question["gold"], question["text"], is_tagged=question.get("is_tagged", False)))


def _restrict_itself() -> None:
    """Give up file writes, network and other processes where the kernel allows it: the input is untrusted."""
    with contextlib.suppress(OSError, KeyError):
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        readable = [sys.prefix, sys.base_prefix, *filesystem.LIBRARIES, *_late_directories()]
        landlock.restrict(landlock.make_ruleset(readable, filesystem.DEVICES))
        program = seccomp.build_filter(kernel.MACHINE)
        kernel.install_filter(seccomp.with_pid(program, seccomp.pid_offsets(program), os.getpid()))


def _late_directories() -> list[str]:
    found = [find_spec(name) for name in LATE_PACKAGES]
    return [place for spec in found if spec for place in spec.submodule_search_locations or ()]


def end_with(lifeline: int) -> None:
    """Have the kernel end this process when the last write end of the pipe `lifeline` closes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO, signal.SIGPROF])
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before the kernel was watching
        sys.exit()


def main() -> None:
    """Answer questions until stdin ends."""
    end_with(int(sys.argv[1]))
    logging.disable(logging.WARNING)  # latex2sympy's grammar warns on stderr
    sys.set_int_max_str_digits(MAX_DIGITS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _restrict_itself()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies, sys.stdout = sys.stdout, sys.stderr  # what a parser prints must not look like a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["deadline_s"])
        try:
            reply = answer(question)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
