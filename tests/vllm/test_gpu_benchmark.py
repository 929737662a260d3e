"""benchmarks/gpu/run.py rehearses its engine part on a CPU: every stage gives figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


def test_every_stage_of_the_engine_gives_figures(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/gpu/run.py", "--tiny", "--parts", "engine", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["problems"] == {}, done.stderr[-3000:]
    engine = found["parts"]["engine"]
    assert {"turns", "step", "one_stream", "request_seeds"} <= engine.keys()
    assert not [name for name, figures in engine.items() if isinstance(figures, dict) and "problem" in figures]
    assert engine["step"]["rollout_tokens_per_s"] > 0
    assert engine["request_seeds"]["share_of_vllm"] > 0
