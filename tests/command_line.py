"""Runs of the command line in a process of their own, and the small tiny world that they train on."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = [
    "--data.world.families=6", "--data.world.train_per_family=2", "--data.world.test_per_family=2",
    "--rollouts.tasks_per_step=6", "--verification.final_samples=8", "--verification.samples=2",
]  # fmt: skip
LORA = ["--model.finetune=lora", "--model.lora_rank=4", "--optimizer.lr=1e-2", "--teacher.kind=ema"]


def run_pmd(
    *arguments: str, code: int = 0, cwd: Path = ROOT, timeout_s: float = 550, first_on_path: Path | None = None
) -> subprocess.CompletedProcess:
    """Run `python -m pmd ARGUMENTS` on one thread; the exit code must be `code`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        path = [str(first_on_path)] if first_on_path else []
        request = {"arguments": arguments, "cwd": str(cwd), "path": path, "out": str(out), "err": str(err)}
        server = _warm_server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(server.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                server.kill()
                _warm_server.cache_clear()
                raise TimeoutError(f"pmd {' '.join(arguments)} took more than {timeout_s} s")
        found = int(json.loads(server.stdout.readline()))
        done = subprocess.CompletedProcess(arguments, found, out.read_text(), err.read_text())
    assert found == code, f"exit code {found}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@cache
def _warm_server() -> subprocess.Popen:
    """Start, once a session, the process whose children run the commands (warm_pmd.py)."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_pmd.py"))],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip


def small_fit(run_dir: Path, epochs: int, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Train on the small tiny world."""
    config = str(ROOT / "configs" / "tiny.yaml")
    epochs_and_folder = [f"--trainer.max_epochs={epochs}", f"--run_dir={run_dir}"]
    return run_pmd("fit", "--config", config, *SMALL, *epochs_and_folder, *arguments, code=code)
