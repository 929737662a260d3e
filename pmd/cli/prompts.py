"""`python -m pmd prompts export DIR`: the texts of the prompts, to edit."""

from pathlib import Path

from pmd.cli.arguments import make_parser
from pmd.errors import ConfigError
from pmd.tasks.prompts.texts import export_texts

DESCRIPTION = """Write the texts of the prompts of teacher, reflection and abstraction to a folder, to edit them.

  python -m pmd prompts export my_prompts
  python -m pmd inspect prompts --config configs/qwen3_8b.yaml --prompts.folder=my_prompts
  python -m pmd fit --config configs/qwen3_8b.yaml --prompts.folder=my_prompts

Fields in braces, such as {question}, must stay. Files that are not edited may be deleted: the originals are used.
Files that are there already are left as they are."""


def main(argv: list[str]) -> int:
    """Write the texts; return 0.

    Raises:
        ConfigError: the folder cannot be written.
    """
    parser = make_parser("prompts", DESCRIPTION)
    parser.add_argument("what", choices=["export"])
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write to; it is made if it is not there")
    arguments = parser.parse_args(argv)
    try:
        written = export_texts(arguments.folder)
    except OSError as error:
        raise ConfigError(f"{arguments.folder} cannot be written ({error.strerror}); give another folder.") from error
    print(f"{len(written)} texts in {arguments.folder}; use them with --prompts.folder={arguments.folder}")
    return 0
