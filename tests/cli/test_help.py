"""Help teaches: every command explains itself, `fit --help` lists every key, and none of it imports torch."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from pmd.cli import COMMANDS, TRAINING
from pmd.config.schema import RunConfig

CHILD = """
import sys
from pmd.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
sys.exit(99 if "torch" in sys.modules else code)
"""


def help_of(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys_of(section: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(section).items():
        keys += keys_of(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def test_the_list_of_commands_is_complete():
    said = help_of("--help")
    assert all(f"  {command} " in said for command in [*TRAINING, *COMMANDS])


@pytest.mark.parametrize("command", sorted([*TRAINING, *COMMANDS]))
def test_a_command_explains_itself(command):
    assert "usage:" in help_of(command, "--help")


def test_fit_lists_every_key():
    said = help_of("fit", "--help")
    assert [key for key in keys_of(RunConfig) if f"  {key} = " not in said] == []
