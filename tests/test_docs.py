"""What the documents say can be typed: files exist, configurations are valid, commands are known."""

import re
from pathlib import Path

import pytest

from pmd.cli import COMMANDS, TRAINING, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m pmd ([a-z]+)([^`\n#]*)")


def commands() -> list[tuple[str, str]]:
    return [match.groups() for document in DOCUMENTS for match in COMMAND.finditer(document.read_text())]


def test_there_are_commands():
    assert len(commands()) > 5


def test_every_command_is_known():
    known = {*TRAINING, *COMMANDS}
    assert {name for name, _ in commands()} <= known


@pytest.mark.parametrize("file", sorted({w for _, rest in commands() for w in re.findall(r"\S+\.yaml", rest)}))
def test_every_named_file_exists(file):
    assert (ROOT / file).is_file() or file.startswith("runs/")


@pytest.mark.parametrize(
    "files", sorted({tuple(re.findall(r"--config[ =](\S+)", rest)) for name, rest in commands() if name == "fit"})
)
def test_every_fit_is_valid(files, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if files and all(Path(file).is_file() for file in files):
        arguments = [word for file in files for word in ("--config", file)]
        assert main(["fit", *arguments, "--print_config"]) in (0, 2)  # 2: its data or device is not here
        assert "is not a known key" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "link", sorted({li for d in DOCUMENTS for li in re.findall(r"\]\(([^)#:]+)\)", d.read_text())})
)
def test_every_link_leads_somewhere(link):
    assert any((folder / link).exists() for folder in (ROOT, ROOT / "docs"))
