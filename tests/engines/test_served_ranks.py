"""Two ranks, and two servers that generate a batch ahead: the run of one process, adapters handed over once each."""

import json
import sqlite3
from pathlib import Path

import pytest
from command_line import small_fit
from scripted_server import serving
from test_server_failures import options

pytestmark = pytest.mark.slow
AHEAD = ["--rollouts.prefetch=true", "--rollouts.tasks_per_step=2"]


def found_in(run: Path) -> tuple[dict, list]:
    """Return the scores of a run, and the attempts that its memory holds: a scripted server writes no insights."""
    phases = json.loads((run / "results.json").read_text())["phases"]
    with sqlite3.connect(run / "memory" / "memory.sqlite") as store:
        return phases, store.execute("select rollout_id, response, reward from experiences").fetchall()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_that_are_served_make_the_run_of_one(tmp_path, strategy):
    found, loads = [], []
    for name, sizes in {"alone": [], "both": [f"--trainer.strategy={strategy}", "--trainer.devices=2"]}.items():
        with serving(lambda number: None) as one, serving(lambda number: None) as other:
            urls = f"--rollouts.server.urls=[{one.url},{other.url}]"
            small_fit(tmp_path / name, 2, *options(one, tmp_path / "adapters"), urls, *AHEAD, *sizes)
            assert set(one.num_loads.values()) == {1}
            assert one.num_loads == other.num_loads
            loads.append(len(one.num_loads))
        found.append(found_in(tmp_path / name))
    assert found[0] == found[1]
    assert all(found[0])
    assert loads[0] == loads[1]  # rank 0 alone hands adapters over
