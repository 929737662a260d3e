"""Every command explains itself with an example, `fit --help` lists every key, and neither imports torch."""

import pytest

from pmd import __version__
from pmd.cli import COMMANDS, TRAINING
from pmd.config.schema import RunConfig
from pmd.config.values import all_keys


@pytest.fixture(scope="module")
def helps(run_all) -> dict[str, str]:
    """What each command says to --help; the empty name is the list of commands."""
    names = ["", *TRAINING, *COMMANDS]
    answers = run_all([[*name.split(), "--help"] for name in names])
    assert [code for code, _, _ in answers] == [0] * len(names)
    return {name: out for name, (_, out, _) in zip(names, answers, strict=True)}


def test_the_list_of_commands_is_complete(helps):
    assert [command for command in [*TRAINING, *COMMANDS] if f"\n  {command} " not in helps[""]] == []


@pytest.mark.parametrize("command", sorted([*TRAINING, *COMMANDS]))
def test_a_command_explains_itself_with_an_example(helps, command):
    assert "usage:" in helps[command]
    assert f"  python -m pmd {command}" in helps[command]


def test_fit_lists_every_key(helps):
    assert [key for key in all_keys(RunConfig) if f"  {key} = " not in helps["fit"]] == []


def test_the_version_is_printed(run_all):
    assert run_all([["--version"]]) == [(0, f"pmd {__version__}\n", "")]
