"""Runs commands of pmd in children of a process that has imported torch and Lightning already.

Each command runs in a process of its own, with its own standard output and exit code, as `python -m pmd` would; only
the seconds that the imports take are not spent again. The process is forked from the one that runs the tests, before
the first of them. Requests and answers are lines of JSON: a command is answered by its process id, a process id by its
exit code, once it has ended.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from types import ModuleType
from typing import TextIO


def fork_server() -> tuple[TextIO, TextIO]:
    """Return where requests are written and answers read; the server ends when the requests do."""
    (requests, asking), (answers, answering) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(asking)
        os.close(answers)
        serve(os.fdopen(requests), os.fdopen(answering, "w"))
        os._exit(0)
    os.close(requests)
    os.close(answering)
    return os.fdopen(asking, "w"), os.fdopen(answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until they end."""
    for module in ("pmd.cli.run", "pmd.planning.sweep.table", "peft", "matplotlib.pyplot"):
        import_module(module)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    sys.modules["__main__"] = ModuleType("__main__")  # what starts Python anew must not import pytest's
    for line in requests:
        request = json.loads(line)
        if isinstance(request, int):
            _, status = os.waitpid(request, 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
        print(json.dumps(answer), file=answers, flush=True)


def run(request: dict) -> None:
    """Become the process of one command; never returns."""
    code = 1
    try:
        with open(os.devnull) as nothing, open(request["out"], "w") as out, open(request["err"], "w") as err:
            for file, number in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)  # not pytest's
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a background job
        if request["file_bytes"]:  # a limit on the size of files stands for a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
        os.environ.update(request["environment"])
        # Here, not before the fork: threads that come later would find a pool that the fork has broken.
        import_module("torch").set_num_threads(1)
        tempfile.tempdir = None  # TMPDIR may be another one now
        os.chdir(request["cwd"])
        sys.path[:0] = request["path"]
        sys.argv = ["pmd", *request["arguments"]]
        code = import_module(request["module"]).main(request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
