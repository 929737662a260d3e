"""The path of the quickstart from tasks of one's own to a model that others load, each command as the page has it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pmd.cli import main

ROOT = Path(__file__).parents[1]
#: What a command of the page needs besides pmd; without it, the command is left out.
NEEDS = {"lm_eval run": "lm_eval", "vllm": "vllm", "runs/tiny": "vllm"}


def blocks(language: str) -> list[str]:
    """Return the blocks of the section with this label."""
    page = (ROOT / "docs" / "quickstart.md").read_text()
    section = page.split("## Train on your own tasks")[1].split("\n## ")[0]
    return [
        text for label, text in re.findall(r"^```(.*)\n((?s:.*?))^```$", section, re.MULTILINE) if label == language
    ]


def commands() -> list[str]:
    """Return the shell commands of the section, in order."""
    return "".join(blocks("")).replace("\\\n", "").splitlines()


def test_the_page_has_commands():
    assert len(commands()) == 18
    assert len(blocks("python")) == 1


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    assert main(["config", "export", "."]) == 0
    programs = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": f"{programs}:{os.environ['PATH']}"}
    said = {}
    if is_installed("vllm"):
        shell("python -m pmd fit --config configs/tiny.yaml --trainer.max_epochs=1", environment)
    for command in commands():
        missing = [name for word, name in NEEDS.items() if word in command]
        if command.startswith(("export", "pip")) or not all(map(is_installed, missing)):
            continue
        said[command] = shell(command, environment)
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} >= {
        "curves.png",
        "metrics.csv",
        "completions",
    }
    assert any("Nothing is wrong" in text for text in said.values())
    assert any(re.search(r"insights: 3 of \d+", text) for text in said.values())
    assert any("success" in text for command, text in said.items() if "inspect step" in command)
    assert any("qwen3" in text for text in said.values())
    assert any("LoraConfig" in text for text in said.values())


def is_installed(name: str) -> bool:
    """Whether a package can be imported; the folder tests/vllm is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def shell(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout
