"""Each run of a sweep sees one GPU, and one that is killed is tried once more."""

import os
import signal
from pathlib import Path

from pmd.planning.sweep.grid import PlannedRun
from pmd.planning.sweep.launch import launch


def fake_run(arguments: list[str]) -> int:
    """Note the GPU; the first attempt of run 0 is killed, and every attempt of run 1."""
    run_dir = Path(next(a for a in arguments if a.startswith("--run_dir=")).removeprefix("--run_dir="))
    with run_dir.with_name(f"{run_dir.name}.seen").open("a") as file:
        file.write(os.environ["CUDA_VISIBLE_DEVICES"] + "\n")
    attempts = run_dir.with_name(f"{run_dir.name}.seen").read_text().count("\n")
    if (run_dir.name == "0" and attempts == 1) or run_dir.name == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_run_sees_one_gpu_and_a_killed_one_is_tried_again(tmp_path):
    fields = {"block": "", "arm": "a", "choices": (), "seed": 0, "arguments": (), "config": "{}"}
    runs = [PlannedRun(**fields, run_dir=tmp_path / str(number)) for number in range(4)]
    codes = {run.run_dir.name: code for run, code in launch(runs, 2, 1, fake_run, "json", ["4", "GPU-b"])}
    assert codes == {"0": 0, "1": -signal.SIGKILL, "2": 0, "3": 0}
    seen = {name: (tmp_path / f"{name}.seen").read_text().split() for name in codes}
    assert {name: len(gpus) for name, gpus in seen.items()} == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert {gpu for gpus in seen.values() for gpu in gpus} == {"4", "GPU-b"}
