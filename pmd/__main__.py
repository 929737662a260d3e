"""`python -m pmd`."""

import os
import sys


def main() -> int:
    """Run the command line; return its exit code."""
    forget_working_directory()
    from pmd.cli import main as run_command
    from pmd.config.processes import launcher_of

    is_rank = launcher_of(os.environ) is not None  # Lightning deletes the variables that say so
    code = run_command()
    if code and is_rank:
        _end_at_once(code)
    return code


def _end_at_once(code: int) -> None:
    """End a rank that has failed. Python's own end takes seconds, in which it is deaf to SIGTERM."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def forget_working_directory() -> None:
    """Stop importing modules from the working directory, where `python -m` puts it first on the path.

    A folder that somebody else filled must not decide what is imported. A module of your own belongs on PYTHONPATH.
    """
    here, home_of_pmd = os.getcwd(), os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    wanted = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if os.path.abspath(sys.path[0]) == here and here not in wanted and os.path.realpath(here) != home_of_pmd:
        del sys.path[0]


if __name__ == "__main__":
    sys.exit(main())
