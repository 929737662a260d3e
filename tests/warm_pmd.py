"""Runs commands of pmd in children of a process that has imported torch and Lightning already.

Each command runs in a process of its own, with its own standard output and exit code, as `python -m pmd` would; only
the seconds that the imports take are not spent again. One request per line of standard input, one exit code per line of
standard output; both are JSON.
"""

import json
import os
import sys
import traceback
from importlib import import_module


def serve() -> None:
    """Answer requests until standard input ends."""
    for module in ("pmd.cli.run", "pmd.planning.sweep.table", "peft", "matplotlib.pyplot"):
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def run(request: dict) -> None:
    """Become the process of one command; never returns."""
    code = 1
    try:
        with open(os.devnull) as nothing, open(request["out"], "w") as out, open(request["err"], "w") as err:
            for file, number in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(file.fileno(), number)
        os.chdir(request["cwd"])
        sys.path[:0] = request["path"]
        sys.argv = ["pmd", *request["arguments"]]
        code = import_module("pmd.cli").main(request["arguments"])
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
