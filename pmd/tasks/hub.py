"""Loads a data set from the Hugging Face Hub or from a folder, with errors that say what to do."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pmd.errors import ConfigError
from pmd.hub import prepare_hub

#: One of these is in every folder that `save_to_disk` wrote, with splits or without.
SAVED = ("dataset_dict.json", "state.json")


def load_rows(
    repository: str, split: str, revision: str | None = None, name: str | None = None
) -> Iterable[Mapping[str, Any]]:
    """Return the rows of one split of the subset `name`.

    Args:
        repository: an id, a local folder of the Hub's layout, or one that `save_to_disk` wrote.

    Raises:
        ConfigError: if it cannot be loaded: no network, no such data set, no such split.
    """
    prepare_hub(repository)
    from datasets import load_dataset

    folder = Path(repository)
    try:
        if any((folder / file).is_file() for file in SAVED):
            return _saved_rows(folder, split)
        return load_dataset(repository, name, split=split, revision=revision)  # type: ignore[return-value]
    except Exception as error:  # network, HTTP, cache and format errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if folder.is_dir():
            raise ConfigError(
                f"data: the folder {repository} cannot be loaded ({reason}); give one with the files of a data set, or "
                "one of its files."
            ) from error
        raise ConfigError(
            f"data: {repository} cannot be loaded from the Hub ({reason}); check the network, or give data.path a "
            "local copy."
        ) from error


def _saved_rows(folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """Return a split of what `save_to_disk` wrote; a data set without splits is the training split."""
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"it has no split {split}; its splits are {', '.join(map(str, splits))}")
    return splits[split]  # type: ignore[return-value]
