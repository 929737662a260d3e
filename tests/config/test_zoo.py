"""Every shipped configuration passes the checks of `fit`, alone and with every overlay."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.yaml"))
FOLDERS = ("configs/methods", "configs/data", "ablations")
#: Overlays by the kind of base that they are for; those of data sets are one of a kind.
OVERLAYS = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.yaml"))
REAL = [overlay for overlay in OVERLAYS if "sciknoweval_" not in overlay or "chemistry" in overlay]
TINY = [overlay for overlay in OVERLAYS if not overlay.startswith("configs/")]
TINY += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs/methods/tiny").glob("*.yaml"))
#: Gives each line of standard input to `fit ... --print_config`; what it prints without `once` in front is read again.
CHILD = """
import contextlib, io, sys, tempfile, pathlib
from pmd.cli import main
for line in sys.stdin.read().splitlines():
    printed = []
    with tempfile.TemporaryDirectory() as folder:
        again = pathlib.Path(folder, "again.yaml")
        once, arguments = line.startswith("once "), line.removeprefix("once ").split()
        for arguments in [arguments] if once else (arguments, ["--config", str(again)]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["fit", *arguments, "--print_config"])
            if code:
                print(f"{line}: exit {code}: {err.getvalue()}")
                break
            printed.append(out.getvalue())
            again.write_text(out.getvalue())
    if len(printed) == 2 and printed[0] != printed[1]:
        print(f"{line}: printed configuration differs when it is read again")
assert "torch" not in sys.modules
"""


#: Replaces what needs a GPU, so that the rest of a configuration is checked on any machine.
ELSEWHERE = "--rollouts.engine=hf --model.finetune=lora --trainer.accelerator=auto"


def complaints(lines: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def lines_of(base: str) -> list[str]:
    """Return the arguments of `fit` for a base, alone and with each overlay; one base shows that overlays are kept."""
    suffix, overlays = ("", TINY) if base.startswith("configs/tiny") else (f" {ELSEWHERE}", REAL)
    once = "" if base == BASES[0] else "once "
    overlaid = [f"{once}--config {base} --config {overlay}{suffix}" for overlay in overlays]
    return [f"--config {base}{suffix}", *overlaid]


@pytest.fixture(scope="module")
def found() -> list[str]:
    """What is wrong with any shipped configuration, and with one that is not shipped."""
    assert len(BASES) > 5
    assert min(len(TINY), len(REAL)) > 10
    return complaints([*(line for base in BASES for line in lines_of(base)), WRONG])


WRONG = "--config configs/tiny.yaml --memory.k=-1"


@pytest.mark.parametrize("base", BASES)
def test_a_shipped_run_parses_alone_and_under_every_overlay(found, base):
    assert [line for line in found if f"--config {base} " in f"{line} " and not line.startswith(WRONG)] == []


def test_nothing_but_the_wrong_configuration_is_found(found):
    (line,) = [line for line in found if "--config" in line]
    assert line.startswith(f"{WRONG}: exit 2: ")
