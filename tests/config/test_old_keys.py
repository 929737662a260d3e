"""Keys of earlier versions are refused with the key that replaced them, in files and on the command line."""

import pytest

from pmd.config.load import load_config
from pmd.config.renamed import REMOVED, RENAMED
from pmd.config.schema import RunConfig
from pmd.config.values import all_keys


def problems_in_both(tmp_path, key: str) -> list[list[str]]:
    """What is said of `key: 0` in a file, and of `key=0` on the command line."""
    section, name = key.split(".")
    file = tmp_path / "old.yaml"
    file.write_text(f"{section}: {{{name}: 0}}")
    return [load_config([file]).problems, load_config([], [f"{key}=0"]).problems]


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_names_the_new_one(tmp_path, old):
    assert problems_in_both(tmp_path, old) == [[f"{old}=0 is now {RENAMED[old]}; rename it."]] * 2


@pytest.mark.parametrize("old", REMOVED)
def test_a_removed_key_says_why(tmp_path, old):
    assert problems_in_both(tmp_path, old) == [[f"{old}=0 was removed: {REMOVED[old]}; delete it."]] * 2


def test_the_new_keys_exist_and_the_old_ones_do_not():
    known = set(all_keys(RunConfig))
    assert set(RENAMED.values()) <= known
    assert not known & {*RENAMED, *REMOVED}
