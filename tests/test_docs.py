"""What the documents say can be typed, opened and looked up: commands, files, configurations, links, keys, metrics."""

import dataclasses
import re
import subprocess
import typing
from functools import cache
from pathlib import Path

import pytest

from pmd.cli import COMMANDS, TRAINING, main
from pmd.config.schema import DataConfig, RunConfig
from pmd.tasks.jsonl import read_task_file
from pmd.types import Message, Task

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md"))]
COMMAND = re.compile(r"python -m pmd ([a-z]+)([^`\n#]*)")
FILE = re.compile(
    r"\b(?:pmd|configs|ablations|benchmarks|notebooks|tests|docs)/[\w./]*\w\.(?:py|yaml|ipynb|txt|sql|md)\b"
)
KEY = re.compile(
    r"`((?:model|optimizer|teacher|objective|data|rollouts|verifiers|verification|reflection|memory)\.[a-z_][a-z_0-9.]*)"
)
METRIC = re.compile(r'"((?:loss|rollout|student|sampling|teacher|verify|reflect|memory|audit|parity|time)/[a-z_0-9]+)"')
LINK = re.compile(r"\]\(([^):\s]+)\)")
#: A run's own files and those of the quickstart's reader, which are not in the repository.
MADE_BY_RUNS = ("runs/", "exported", "mine.yaml")


@cache
def text_of(document: Path) -> str:
    """Return a document with continued command lines joined."""
    return document.read_text().replace("\\\n", " ")


def commands() -> list[tuple[str, str]]:
    return [match.groups() for document in DOCUMENTS for match in COMMAND.finditer(text_of(document))]


def in_documents(pattern: re.Pattern) -> list[tuple[str, str]]:
    """Return each finding with its document, both as text, for parametrisation."""
    pairs = {(str(d.relative_to(ROOT)), found) for d in DOCUMENTS for found in pattern.findall(text_of(d))}
    return sorted(pairs)


def slugs(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def has_key(key: str) -> bool:
    section: typing.Any = RunConfig
    for name in key.split("."):
        if not dataclasses.is_dataclass(section) or name not in {field.name for field in dataclasses.fields(section)}:
            return False
        section = typing.get_type_hints(section)[name]
    return True


def test_there_are_commands():
    assert len(commands()) > 40


def test_every_command_is_known():
    assert {name for name, _ in commands()} <= {*TRAINING, *COMMANDS}


def test_every_command_that_users_know_is_still_shown():
    shown = " ".join(" ".join(text_of(document).split()) for document in DOCUMENTS)
    known = (ROOT / "tests" / "documented_commands.txt").read_text().splitlines()
    assert [command for command in known if command not in shown] == []


@pytest.mark.parametrize("file", sorted({w for _, rest in commands() for w in re.findall(r"[\w./]+\.yaml", rest)}))
def test_every_configuration_in_a_command_exists(file):
    assert (ROOT / file).is_file() or file.startswith(MADE_BY_RUNS)


@pytest.mark.parametrize(
    "files", sorted({tuple(re.findall(r"--config[ =](\S+)", rest)) for name, rest in commands() if name == "fit"})
)
def test_every_fit_is_valid(files, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if files and all(Path(file).is_file() for file in files):
        arguments = [word for file in files for word in ("--config", file)]
        assert main(["fit", *arguments, "--print_config"]) in (0, 2)  # 2: its data or device is not here
        assert "is not a known key" not in capsys.readouterr().err


@pytest.mark.parametrize(("document", "file"), in_documents(FILE))
def test_every_named_file_exists(document, file):
    if "NAME" not in file:
        assert (ROOT / file).is_file()


@pytest.mark.parametrize(("document", "link"), [pair for pair in in_documents(LINK) if "://" not in pair[1]])
def test_every_link_leads_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent / path if path else ROOT / document
    assert target.exists()
    assert not anchor or anchor in slugs(target)


@pytest.mark.parametrize(("document", "key"), [pair for pair in in_documents(KEY) if not pair[1].endswith(".py")])
def test_every_named_key_exists(document, key):
    assert has_key(key)


def test_every_logged_metric_is_explained():
    explained = (ROOT / "docs" / "evaluation.md").read_text()
    logged = {name for file in (ROOT / "pmd").rglob("*.py") for name in METRIC.findall(file.read_text())}
    logged -= {"memory/items"}  # a table in Weights & Biases
    assert len(logged) > 30
    assert sorted(name for name in logged if f"`{name}`" not in explained) == []


def test_the_example_of_a_task_file_is_valid(tmp_path):
    page = (ROOT / "docs" / "own_task.md").read_text()
    example = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "tasks.jsonl").write_text(example)
    tasks, problems = read_task_file(str(tmp_path / "tasks.jsonl"), "train", DataConfig(allow_modules=["my_checks"]))
    assert (len(tasks), problems) == (20, [])
    assert {task.verifier for task in tasks} >= {"mcq", "exact", "math", "tool_use", "code"}


def test_the_example_of_a_verifier_works():
    page = (ROOT / "docs" / "own_task.md").read_text()
    namespace: dict = {}
    exec(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0], namespace)
    task = Task("t", (Message("user", "Write a palindrome."),), "my_checks.verify_palindrome", "train")
    verdicts = [namespace["verify_palindrome"](task, text) for text in ("Level", "lever", " ")]
    assert [(verdict.correct, verdict.status) for verdict in verdicts] == [
        (True, "ok"), (False, "wrong_answer"), (False, "format"),
    ]  # fmt: skip


def test_what_the_commands_of_the_pages_write_is_ignored_by_git():
    written = {
        path for _, path in in_documents(re.compile(r"--out[ =]([\w./-]+)")) if not path.startswith(("/", "docs/"))
    }
    written = sorted(path for path in written if path != "FOLDER")
    assert len(written) > 5
    command = ["git", "check-ignore", "--no-index", *(path if "." in path else f"{path}/" for path in written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [path.rstrip("/") for path in done.stdout.split()] == written


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
