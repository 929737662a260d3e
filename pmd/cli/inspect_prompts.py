"""`python -m pmd inspect prompts`: every kind of prompt of a run, as text, before the run."""

from rich.console import Console
from rich.text import Text

from pmd.cli.arguments import load_checked, make_config_parser, split_options
from pmd.cli.printable import printable
from pmd.errors import ConfigError

DESCRIPTION = """Show every kind of prompt for one task, as the model will get it, with made-up memory and attempts.

  python -m pmd inspect prompts --config configs/tiny.yaml
  python -m pmd inspect prompts --config configs/qwen3_8b.yaml --data.task=jsonl --data.path=tasks.jsonl --task sum
  python -m pmd inspect prompts --config configs/tiny.yaml --list

The student's prompt, the teacher's with memory, with a success and with a failure, the reflection's and the
abstraction's. Special tokens are shown as they are written. No weights are loaded."""


def main(argv: list[str]) -> int:
    """Print the prompts of one task, or the tasks; return 0."""
    parser = make_config_parser("inspect", DESCRIPTION)
    parser.add_argument("--task", metavar="ID", help="id of the task (default: the first training task)")
    parser.add_argument("--list", action="store_true", help="list the tasks' ids with the length of their prompts")
    options, rest = split_options(parser, argv)
    loaded = load_checked("inspect", rest)
    from pmd.pretrained import load_tokenizer
    from pmd.tasks import load_tasks
    from pmd.tasks.prompts import make_prompts
    from pmd.tasks.prompts.examples import example_prompts

    run, console = loaded.run, Console()
    tasks = [task for part in load_tasks(run.data, run.seed_everything).values() for task in part]
    tokenizer = load_tokenizer(run.model)
    prompts = make_prompts(run, tokenizer)
    if options.list:
        for task in dict.fromkeys(tasks):
            line = f"{task.task_id}  {task.split}, {task.verifier}, {len(prompts.student(task))} tokens"
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
        return 0
    found = [task for task in tasks if options.task in (None, task.task_id)]
    if not found:
        raise ConfigError(f"--task={options.task} is no task of this configuration; --list shows their ids.")
    for name, ids in example_prompts(prompts, found[0]).items():
        console.rule(Text(f"{name}, {len(ids)} tokens", style="bold"), align="left")
        console.print(printable(str(tokenizer.decode(ids)).strip("\n")), markup=False, highlight=False, soft_wrap=True)
        console.print()
    return 0
