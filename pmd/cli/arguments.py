"""Shared by the commands: parsers that keep line breaks, a command's own options, and loading a configuration."""

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from pmd.config.check import check_config
from pmd.config.load import LoadedConfig, load_arguments
from pmd.errors import ConfigError
from pmd.tasks import describe_task_problems


def make_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser for `python -m pmd COMMAND` that keeps the line breaks of its texts."""
    return argparse.ArgumentParser(
        prog=f"python -m pmd {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def make_config_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for a command that takes a configuration, as `fit` does, and options of its own."""
    return argparse.ArgumentParser(
        prog=f"python -m pmd {command}",
        usage=f"python -m pmd {command} --config FILE [--config OVERLAY]... [--section.key=VALUE]... [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def split_options(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    check: Callable[[argparse.Namespace], list[str]] = lambda options: [],
) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and the remaining arguments, which describe the configuration.

    Raises:
        ConfigError: `check` finds problems in the options, or an argument looks like a misspelt option.
    """
    options, rest = parser.parse_known_args(argv)
    own = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    words = [word.partition("=")[0] for word in rest if word.startswith("--")]
    close = {word: get_close_matches(word, own, n=1) for word in words if "." not in word and word != "--config"}
    problems = check(options)
    problems += [
        f"{word} is not an option of {parser.prog.split()[-1]}; did you mean {found[0]}?"
        for word, found in close.items()
        if found
    ]
    if problems:
        raise ConfigError(problems)
    return options, rest


def load_checked(command: str, arguments: Sequence[str], fixed: Sequence[str] = ()) -> LoadedConfig:
    """Load and check a configuration and the data files that it names; `fixed` overrides come last.

    Raises:
        ConfigError: with everything wrong with it.
    """
    loaded = load_arguments(command, arguments, fixed)
    check_config(loaded, describe_task_problems(loaded.run))
    return loaded
