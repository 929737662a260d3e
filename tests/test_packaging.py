"""The package as users get it: its dependencies can be resolved, and a wheel alone can train."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from pmd import __version__
from pmd.cli import main
from pmd.cli.config import FOLDERS

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PIN = re.compile(r"([a-z0-9-]+)==([^ ;]+)")


def pins(text: str) -> set[tuple[str, str]]:
    """Return (name, version) of every pinned line."""
    return {found.groups() for line in text.splitlines() if (found := PIN.match(line))}


def test_both_files_of_constraints_agree_but_for_numpy():
    core, gpu = (pins((ROOT / name).read_text()) for name in ("constraints.txt", "constraints-gpu.txt"))
    assert len(core) > 20
    assert len(gpu) > 200
    named = {name for name, _ in gpu}
    assert {pin for pin in core - gpu if pin[0] in named} <= {("numpy", dict(core)["numpy"])}


def test_configurations_are_exported_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "configs/tiny.yaml"]) == 2
    assert "`python -m pmd config export .` writes" in capsys.readouterr().err
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("mine")
    assert main(["config", "export", "."]) == 0
    files = {str(path.relative_to(ROOT)) for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()}
    assert f"{len(files) - 1} files written to ." in capsys.readouterr().out
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == files
    assert (tmp_path / "configs" / "tiny.yaml").read_text() == "mine"
    assert main(["config", "export"]) == main(["config", "schema", "."]) == 2


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_gpu_extra_can_be_resolved(python):
    """Needs a package index. With the constraints nothing is left open: every package is pinned by them."""
    command = "-m uv pip compile pyproject.toml --extra gpu -q --no-annotate --no-header --python-version"
    uv = [sys.executable, *command.split(), python, "--python-platform", "x86_64-manylinux_2_28"]
    free = pins(run(*uv, cwd=ROOT))
    assert {"torch", "vllm", "bitsandbytes", "hnswlib"} <= {name for name, _ in free}
    assert pins(run(*uv, "-c", "constraints-gpu.txt", cwd=ROOT)) <= pins((ROOT / "constraints-gpu.txt").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_alone_trains_the_tiny_model(tmp_path):
    """Built from the source distribution, installed in a fresh environment, run outside the repository."""
    run(sys.executable, "-m", "build", "-q", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    venv.create(tmp_path / "venv", with_pip=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    programs = tmp_path / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, env=clean)
    empty = tmp_path / "empty"
    empty.mkdir()
    pmd = programs / "pmd"
    assert __version__ in run(pmd, "--version", cwd=empty, env=clean)
    run(pmd, "config", "export", ".", cwd=empty, env=clean)
    told = run(pmd, "fit", "--config", "configs/tiny.yaml", "--trainer.max_epochs=1", cwd=empty, env=clean)
    assert "last checkpoint" in told
    assert (empty / "runs" / "tiny" / "results.json").is_file()
    run(pmd, "check", "--config", "configs/tiny_jsonl.yaml", cwd=empty, env=clean)
    where = run(programs / "python", "-c", "import pmd; print(pmd.__file__)", cwd=empty, env=clean)
    assert str(tmp_path / "venv") in where
