"""Loads a data set from the Hugging Face Hub, with errors that say what to do."""

from collections.abc import Iterable, Mapping
from typing import Any

from pmd.errors import ConfigError
from pmd.hub import prepare_hub


def load_rows(
    repository: str, split: str, revision: str | None = None, name: str | None = None
) -> Iterable[Mapping[str, Any]]:
    """Return the rows of one split of the subset `name`. `repository` may also be a local folder of the same layout.

    Raises:
        ConfigError: if it cannot be loaded: no network, no such data set, no such split.
    """
    prepare_hub(repository)
    from datasets import load_dataset

    try:
        return load_dataset(repository, name, split=split, revision=revision)  # type: ignore[return-value]
    except Exception as error:  # network, HTTP, cache and format errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise ConfigError(
            f"data: {repository} cannot be loaded from the Hub ({reason}); check the network, or give data.path a "
            "local copy."
        ) from error
