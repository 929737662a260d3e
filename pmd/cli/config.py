"""`python -m pmd config`: the JSON schema of the configuration files, and the files that come with pmd."""

import json
import shutil
from pathlib import Path

import pmd
from pmd.cli.arguments import make_parser
from pmd.config.json_schema import json_schema
from pmd.errors import ConfigError

DESCRIPTION = """Write the configurations that come with pmd, or print the JSON schema of such files.

  python -m pmd config export .              writes configs/ and ablations/ here, as all pages of the manual name them
  python -m pmd config schema > schema.json

Files that are there already are left as they are. With the schema, an editor with a YAML language server completes
keys, shows what they mean, and marks misspelt ones; the first line of a configuration in the same folder names it:

  # yaml-language-server: $schema=schema.json

The configurations that come with pmd refer to configs/schema.json. The values of all keys of a run are printed by
`python -m pmd fit --config FILE --print_config`."""
SUBCOMMANDS = ("export", "schema")
FOLDERS = ("configs", "ablations")


def main(argv: list[str]) -> int:
    """Print the schema or write the files; return 0.

    Raises:
        ConfigError: the subcommand is unknown, or the folder cannot be written.
    """
    parser = make_parser("config", DESCRIPTION)
    parser.add_argument("what", nargs="?", metavar="schema|export", help="what to print or write")
    parser.add_argument("folder", nargs="?", metavar="DIR", type=Path, help="export: the folder to write to")
    options = parser.parse_args(argv)
    if options.what not in SUBCOMMANDS:
        named = "needs a subcommand" if options.what is None else f"has no subcommand {options.what}"
        raise ConfigError(
            f"config {named}; `python -m pmd config schema` prints the JSON schema, `python -m pmd config export DIR` "
            "writes the configurations that come with pmd, and `python -m pmd fit --config FILE --print_config` prints "
            "a configuration."
        )
    if (options.folder is None) == (options.what == "export"):
        problem = "needs a folder; write config export DIR." if options.folder is None else "takes no folder."
        raise ConfigError(f"config {options.what} {problem}")
    if options.what == "schema":
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return 0
    try:
        written = export_files(options.folder)
    except OSError as error:
        raise ConfigError(f"{options.folder} cannot be written ({error.strerror}); give another folder.") from error
    print(f"{len(written)} files written to {options.folder}; next: python -m pmd fit --config configs/tiny.yaml")
    return 0


def export_files(folder: Path) -> list[Path]:
    """Write the shipped files to a folder and return their paths; files that are there already are left as they are."""
    source, written = shipped_files(), []
    for found in sorted(path for name in FOLDERS for path in (source / name).rglob("*") if path.is_file()):
        target = folder / found.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)
            written.append(target)
    return written


def shipped_files() -> Path:
    """Return the folder that holds configs/ and ablations/: the package's, or that of the repository it lies in."""
    package = Path(pmd.__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent
