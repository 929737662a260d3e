"""Each run of a sweep on one machine has GPUs of its own, and one that dies goes on from its last checkpoint."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from command_line import ROOT

from pmd.cli import main
from pmd.cli.sweep import _slots
from pmd.errors import ConfigError
from pmd.planning.sweep.attempt import Attempt, log_file
from pmd.planning.sweep.grid import PlannedRun
from pmd.planning.sweep.here import Here, gpu_slots
from pmd.planning.sweep.launch import launch
from pmd.run_dir import RunDir


def planned(run_dir: Path, devices: int = 1, accelerator: str = "auto") -> PlannedRun:
    config = json.dumps({"trainer": {"strategy": "ddp", "devices": devices, "accelerator": accelerator}})
    return PlannedRun(block="", arm="a", choices=(), seed=0, arguments=(), config=config, run_dir=run_dir)


class Scripted:
    """A place where each attempt of a run ends with the next of its codes, after a checkpoint if it is run `saves`."""

    def __init__(self, codes: dict[str, list[int]], slots: int):
        self.codes, self.slots = codes, slots
        self.started: list[tuple[str, bool]] = []  # name, whether it resumes
        self.running: list[Attempt] = []

    def start(self, attempt: Attempt) -> None:
        self.running.append(attempt)
        assert len(self.running) <= self.slots
        run = RunDir(attempt.run.run_dir)
        self.started.append((run.root.name, "--ckpt_path=last" in attempt.prepare()))
        if run.root.name == "saves":
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            run.last.touch()

    def ended(self) -> list[tuple[Attempt, int]]:
        attempt = self.running.pop(0)
        return [(attempt, self.codes[attempt.run.run_dir.name].pop(0))]

    def stop(self) -> None:
        self.running.clear()


def test_a_run_that_died_goes_on_from_its_last_checkpoint_a_few_times(tmp_path):
    codes = {"saves": [-9, 0], "dies": [-9, 137, -11, 0], "wrong": [2, 0], "fails": [1, 0], "stopped": [130, 0]}
    place = Scripted(codes, slots=2)
    outcomes = list(launch([planned(tmp_path / name) for name in codes], place, threads=1, retries=2))
    ends = {o.run.run_dir.name: o.code for o in outcomes if o.retries_left is None}
    assert ends == {"saves": 0, "dies": -11, "wrong": 2, "fails": 1, "stopped": 130}
    assert sorted((o.run.run_dir.name, o.retries_left) for o in outcomes if o.retries_left is not None) == [
        ("dies", 0), ("dies", 1), ("saves", 1),
    ]  # fmt: skip
    assert [resumes for name, resumes in place.started if name == "saves"] == [False, True]
    assert [resumes for name, resumes in place.started if name == "dies"] == [False, False, False]


def fake_run(arguments: list[str]) -> int:
    """Note the GPU; the run named `killed` is killed."""
    run_dir = Path(next(a for a in arguments if a.startswith("--run_dir=")).removeprefix("--run_dir="))
    run_dir.with_name(f"{run_dir.name}.seen").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    if run_dir.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_each_process_sees_its_own_gpu(tmp_path):
    runs = [planned(tmp_path / name) for name in ("killed", "good")]
    outcomes = launch(runs, Here(fake_run, "test_sweep_gpus", ["4", "GPU-b"], 1), threads=1, retries=0)
    assert {o.run.run_dir.name: o.code for o in outcomes} == {"killed": -signal.SIGKILL, "good": 0}
    assert {(tmp_path / f"{name}.seen").read_text() for name in ("killed", "good")} == {"4", "GPU-b"}
    assert log_file(runs[0]).read_text() == f"python -m pmd fit --run_dir={runs[0].run_dir}\n"


def test_runs_share_a_gpu_only_where_that_was_asked_for():
    runs = [planned(Path("a")), planned(Path("b"))]
    assert _slots(None, 1, runs, ["0", "1"]) == ["0", "1"]
    assert _slots(1, 1, runs, ["0", "1"]) == ["0"]
    assert sorted(_slots(None, 2, runs, ["0", "1"])) == ["0", "0", "1", "1"]
    with pytest.raises(ConfigError, match=r"--jobs=3: 2 GPU\(s\) hold 2 run\(s\) at a time.*raise --runs-per-gpu=1"):
        _slots(3, 1, runs, ["0", "1"])
    assert _slots(3, 1, [planned(Path("a"), accelerator="cpu")], ["0"]) == [None] * 3


def test_a_run_on_several_devices_has_all_of_them_to_itself():
    assert gpu_slots(["0", "1", "2", "3", "4"], 2, 1) == ["0,1", "2,3"]
    assert _slots(None, 1, [planned(Path("a"), devices=2)], ["0", "1", "2"]) == ["0,1"]
    with pytest.raises(ConfigError, match=r"trainer\.devices=4 needs as many GPUs, and there are 2"):
        _slots(None, 1, [planned(Path("a"), devices=4)], ["0", "1"])


def test_options_that_cannot_work_are_refused_at_once(tmp_path, capsys, monkeypatch):
    grid = str(ROOT / "ablations" / "grids" / "tiny_levels.yaml")
    wrong = ["--jobs=0", "--retries=-1", "--slurm", "partition", "--on=ray"]
    assert main(["sweep", grid, *wrong]) == 2
    said = capsys.readouterr().err
    for words in (
        "--jobs=0 must be at least 1",
        "--retries=-1 must be at least 0",
        "--slurm partition is no OPTION=VALUE",
    ):
        assert words in said
    assert main(["sweep", grid, "--on=slurm", "--runs-per-gpu=2"]) == 2
    assert "--runs-per-gpu=2 is not for --on slurm" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.chdir(ROOT)
    assert main(["sweep", grid, "--on=ray", f"--out={tmp_path}"]) == 2
    assert "--on=ray needs the package ray; pip install 'pmd[ray]'" in capsys.readouterr().err
