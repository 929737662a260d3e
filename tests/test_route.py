"""docs/one_step.md keeps its promise: its excerpts are the code, and its lists are the files that run."""

import json
import re

import pytest
from command_line import ROOT, run_pmd

PAGE = (ROOT / "docs" / "one_step.md").read_text(encoding="utf-8")
EXCERPTS = re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL)
#: The most files whose code may run in each part of an epoch of the tiny world.
MOST = {"training_step": 11, "batch": 16, "epoch_end": 25, "memory_callback": 15, "checkpoint": 11}


def listed(part: str) -> list[str]:
    """Return the files that the page lists behind the comment `files: PART`."""
    found = re.search(rf"<!-- files: {part} -->\n(.*?)\n\n", PAGE + "\n\n", re.DOTALL)
    assert found is not None, f"the page lists no files for {part}"
    return sorted(re.findall(r"`([^`]+)`", found[1]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, list[str]]:
    """The files that run, from two real epochs of configs/tiny.yaml."""
    done = run_pmd(str(tmp_path_factory.mktemp("route") / "run"), module="record_route")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", MOST)
def test_the_lists_are_what_runs(recorded, part):
    assert recorded[part] == listed(part)
    assert len(recorded[part]) <= MOST[part]


@pytest.mark.parametrize(("file", "code"), EXCERPTS)
def test_the_excerpts_are_the_code(file, code):
    assert code in (ROOT / file).read_text(encoding="utf-8")


def test_the_reading_route_is_nine_files():
    route = re.findall(r"^\| \d \| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert len(route) == 9
    assert all((ROOT / "pmd" / file).is_file() for file in route)


def test_the_table_of_places_names_files():
    rows = PAGE.split("## Where to add what")[1]
    files = {file for file in re.findall(r"`([\w/]+(?:\.py|/))`", rows)}
    assert len(files) >= 10
    assert [file for file in sorted(files) if not (ROOT / "pmd" / file).exists()] == []
