"""The list of a step's rollouts fits a terminal of 80 columns, and cuts nothing off."""

import io

from rich.console import Console

from pmd.cli.inspect import list_rollouts

RECORD = {
    "reward": 0.3333333, "status": "runtime_error", "completion_ids": [0] * 4096, "memory": [{}] * 12,
    "success_shown": None, "failure_shown": True, "per_token_divergence": [1.5, 0.5],
}  # fmt: skip


def test_it_fits_80_columns():
    records = [{**RECORD, "task_id": "tiny4-s0/train/pug/0"}, {**RECORD, "task_id": "x" * 60, "success_shown": "a"}]
    out = io.StringIO()
    list_rollouts(records, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    told = ["0", records[0]["task_id"], "0.333333", "runtime_error", "4096", "12", "failure", "1.000"]
    assert lines[1].split() == told
    assert out.getvalue().count("x") == 60
