"""What a run directory gives back of a run that was cut short."""

import pytest

from pmd.run_dir import RunDir


@pytest.mark.parametrize(
    "torn",
    ["1", "1,0.5,9,9", "x,0.5,1", "1,zero,1", "1,0.5", ",0.5,1", "\x00\x00,0.5,1", "1,0.\ufffd5,1"],
)
def test_incomplete_rows_of_metrics_are_skipped(tmp_path, torn):
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text(f"step,loss/total,verify/avg\n0,0.25,\n{torn}\n2,nan,0.5\n")
    assert [row["step"] for row in run_dir.read_metrics()] == ["0", "2"]
    assert run_dir.read_metrics()[0] == {"step": "0", "loss/total": "0.25", "verify/avg": ""}


def test_a_run_without_metrics_has_none(tmp_path):
    assert RunDir(tmp_path).read_metrics() == []
