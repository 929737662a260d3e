"""metrics.csv: no row is lost or written twice, whatever the columns, and it is replaced whole."""

import pytest
import torch

from pmd.errors import DiskError
from pmd.metrics_log import MetricsLog
from pmd.run_dir import RunDir


def log_steps(log: MetricsLog, *steps: int, **metrics: float) -> None:
    for step in steps:
        log.log_metrics({"loss": torch.tensor(step / 10), "epoch": step // 2, **metrics}, step=step)
        log.save()


def steps_in(run_dir: RunDir) -> list[int]:
    return [int(row["step"]) for row in run_dir.read_metrics()]


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(tmp_path)


def test_rows_and_new_columns(run_dir):
    log = MetricsLog(run_dir)
    assert not run_dir.metrics.exists()  # nothing is there to be refused by the next attempt to start
    log_steps(log, 0, 1)
    assert run_dir.metrics.read_text().splitlines() == ["epoch,loss,step", "0,0.0,0", "0,0.10000000149011612,1"]
    log.log_metrics({"verify/avg": 0.5}, step=1)
    log_steps(log, 2)
    log.commit()
    assert run_dir.metrics.read_text().splitlines() == [
        "epoch,loss,step,verify/avg", "0,0.0,0,", "0,0.10000000149011612,1,", ",,1,0.5", "1,0.20000000298023224,2,",
    ]  # fmt: skip


def test_a_new_run_begins_a_new_file(run_dir):
    run_dir.metrics.write_text("step,loss\n0,1.0\n7,1.0\n")
    log_steps(MetricsLog(run_dir), 0)
    assert steps_in(run_dir) == [0]


@pytest.mark.parametrize("garbage", ["", "4,0.1", "4,0.1\n\x00\xff,,\nx,y,z", "\n" + "9" * 200_000])
def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(run_dir, garbage):
    log_steps(MetricsLog(run_dir), 0, 1, 2, 3)
    with run_dir.metrics.open("a") as file:
        file.write(garbage)
    log = MetricsLog(run_dir, resumed_at=2)
    assert steps_in(run_dir) == [0, 1]
    log_steps(log, 2, 3, more=1.0)
    assert steps_in(run_dir) == [0, 1, 2, 3]


def test_rows_of_a_later_checkpoint_stay_until_a_new_one_takes_its_place(run_dir):
    log_steps(MetricsLog(run_dir), 0, 1, 2, 3)
    log = MetricsLog(run_dir, resumed_at=2, keep_later=True)
    log_steps(log, 2)
    assert steps_in(run_dir) == [0, 1, 2, 3]
    log_steps(log, 3, 4)
    log.commit()
    assert steps_in(run_dir) == [0, 1, 2, 3, 4]
    assert len(run_dir.read_metrics()) == 5


def test_a_failure_keeps_what_there_was(run_dir):
    log = MetricsLog(run_dir)
    log_steps(log, 0)
    before = run_dir.metrics.read_bytes()
    (run_dir.root / "metrics.csv.part").mkdir()  # nothing can be written beside it
    with pytest.raises(DiskError, match=r"metrics.csv could not be written \(Is a directory\)"):
        log_steps(log, 1, more=1.0)
    log.finalize("failed")  # what ended the run is reported, not this
    with pytest.raises(DiskError):
        log.finalize("success")
    assert run_dir.metrics.read_bytes() == before
