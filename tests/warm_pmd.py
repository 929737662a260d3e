"""Runs commands of pmd in children of a process that has imported torch and Lightning already.

Each command runs in a process of its own, with its own standard output and exit code, as `python -m pmd` would; only
the seconds that the imports take are not spent again. Requests and answers are lines of JSON: a command is answered by
its process id, a process id by its exit code, once it has ended.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from importlib import import_module


def serve() -> None:
    """Answer requests until standard input ends."""
    for module in ("pmd.cli.run", "pmd.planning.sweep.table", "peft", "matplotlib.pyplot"):
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            _, status = os.waitpid(request, 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
        print(json.dumps(answer), flush=True)


def run(request: dict) -> None:
    """Become the process of one command; never returns."""
    code = 1
    try:
        with open(os.devnull) as nothing, open(request["out"], "w") as out, open(request["err"], "w") as err:
            for file, number in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(file.fileno(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a background job
        if request["file_bytes"]:  # a limit on the size of files stands for a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # TMPDIR may be another one now
        os.chdir(request["cwd"])
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


if __name__ == "__main__":
    serve()
