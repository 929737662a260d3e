"""`python -m pmd config schema`: the JSON schema of the configuration files, for editors."""

import argparse
import json

from pmd.cli.arguments import make_parser
from pmd.config.json_schema import json_schema
from pmd.errors import ConfigError

DESCRIPTION = """Print the JSON schema of the configuration files. An editor with a YAML language server then completes
keys, shows what they mean, and marks misspelt ones.

  python -m pmd config schema > schema.json

and, as the first line of a configuration in the same folder:

  # yaml-language-server: $schema=schema.json

The configurations that come with pmd refer to configs/schema.json. The values of all keys of a run are printed by
`python -m pmd fit --config FILE --print_config`."""
SUBCOMMANDS = ("schema",)


def main(argv: list[str]) -> int:
    """Print the schema; return 0."""
    parser = make_parser("config", DESCRIPTION)
    parser.add_argument("what", nargs="?", metavar="schema", help="the only subcommand")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if arguments.what not in SUBCOMMANDS:
        named = "needs a subcommand" if arguments.what is None else f"has no subcommand {arguments.what}"
        raise ConfigError(
            f"config {named}; `python -m pmd config schema` prints the JSON schema, and "
            "`python -m pmd fit --config FILE --print_config` prints a configuration."
        )
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
    return 0
