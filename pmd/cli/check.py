"""`python -m pmd check --config FILE`: tries everything of a run that takes seconds, and loads no weights."""

import os

from rich.console import Console

from pmd.cli.arguments import make_config_parser, split_options
from pmd.config.check import check_config
from pmd.config.load import load_arguments
from pmd.config.processes import process_problems
from pmd.run_dir import describe_run_dir_problems, fit_run_dir
from pmd.tasks import describe_task_problems

DESCRIPTION = """Try what a run needs before it starts: the configuration, the tasks, the model's files, template,
vocabulary and ends, one prompt of each role, each verifier on an empty and a plausible completion, the run directory.

  python -m pmd check --config configs/tiny.yaml
  python -m pmd check --config configs/qwen3_8b.yaml --data.task=jsonl --data.path=tasks.jsonl

Everything wrong is said at once (exit code 2). `fit` makes the same check by itself, before weights load. Whether they
fit into memory is predicted by `python -m pmd doctor`."""


def main(argv: list[str]) -> int:
    """Print what was found; return 0 if the run can start.

    Raises:
        ConfigError: it cannot.
    """
    _, rest = split_options(make_config_parser("check", DESCRIPTION), argv)
    loaded = load_arguments("check", rest)
    run_dir_problems = describe_run_dir_problems("fit", loaded.run, loaded.folder, loaded.name)
    check_config(loaded, [*process_problems(os.environ), *run_dir_problems, *describe_task_problems(loaded.run)])
    run_dir = fit_run_dir(loaded.run, loaded.folder, loaded.name)
    run_dir.check_writable()
    from pmd.cli.preflight import check_run
    from pmd.cli.trainer import TrainerCLI

    TrainerCLI(loaded.trainer)  # its loggers and callbacks can be made
    ready, console = check_run(loaded.run), Console()
    engine = f"engine: {loaded.run.rollouts.engine}; run directory: {run_dir.root}"
    for line in [*ready.report, engine, *ready.notes, "Nothing is wrong: `fit` can start."]:
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    return 0
