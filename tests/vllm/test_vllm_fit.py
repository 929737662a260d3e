"""`pmd fit` with vLLM as its engine: LoRA and full fine-tuning, resuming, and the shipped configurations."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import ROOT, run_pmd
from questions import make_questions
from vllm_runs import metrics

from pmd.bootstrap.random_model import make_random_model

pytestmark = pytest.mark.vllm
CPU = ["--rollouts.engine=vllm", "--rollouts.vllm.kv_cache_memory_bytes=33554432", "--rollouts.vllm.block_size=32"]
TINY = [
    "--config", "configs/tiny.yaml", *CPU, "--rollouts.vllm.parity_bound=1e-4", "--trainer.max_epochs=2",
    "--data.world.families=6", "--data.world.train_per_family=2", "--data.world.test_per_family=1",
    "--rollouts.tasks_per_step=6", "--verification.final_samples=8", "--verification.samples=2",
]  # fmt: skip


@pytest.mark.parametrize("extra", [["--model.finetune=full"], ["--model.finetune=lora", "--teacher.kind=ema"]])
def test_two_epochs(tmp_path, extra):
    run_dir = tmp_path / "run"
    output = run_pmd("fit", *TINY, *extra, f"--run_dir={run_dir}").stdout
    assert "vLLM is ready" in output
    results = json.loads((run_dir / "results.json").read_text())
    assert results["updates"] == 4
    assert {"initial", "last"} <= set(results["phases"])
    gaps = metrics(run_dir, "parity/max")
    assert len(gaps) == 4
    assert 0 < max(gaps) <= 1e-4
    assert max(metrics(run_dir, "sampling/engine_gap")) <= 1e-4
    assert min(metrics(run_dir, "time/sync_s")) > 0
    assert max(metrics(run_dir, "memory/insights")) > 0


@pytest.mark.parametrize(
    ("config", "architecture"), [("qwen3_8b", "qwen3"), ("qwen3_8b_qlora", "qwen3"), ("olmo3_7b", "olmo3")]
)
def test_a_gpu_configuration_runs_on_the_cpu_at_a_tiny_shape(tmp_path, config, architecture):
    model = make_random_model(tmp_path / "model", architecture)
    data = make_questions(tmp_path, 24)
    run_pmd(
        "fit", "--config", f"configs/{config}.yaml", "--config", "configs/overlays/cpu_vllm.yaml",
        f"--model.path={model}", f"--data.path={data}", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text())["updates"] == 4
    assert max(metrics(tmp_path / "run", "parity/max")) <= 1e-4


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(tmp_path):
    """The engine dies with the process, so the rollouts of the unfinished epoch are generated again."""
    lora = [*TINY, "--model.finetune=lora", "--teacher.kind=ema"]
    run_pmd("fit", *lora, f"--run_dir={tmp_path / 'whole'}")
    command = [sys.executable, "-m", "pmd", "fit", *lora, f"--run_dir={tmp_path / 'run'}"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not last.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run_pmd("fit", *lora, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last")
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("whole", "run")
    )
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=0)
    assert len(metrics(tmp_path / "run", "parity/max")) == 4


def test_resuming_a_finished_run_evaluates_the_weights_that_it_ended_with(tmp_path):
    """No step is taken, so no sync after a step gives the engine the weights."""
    arguments = [*TINY, "--model.finetune=lora", "--optimizer.lr=3e-2", f"--run_dir={tmp_path / 'run'}"]
    run_pmd("fit", *arguments)
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    run_pmd("fit", *arguments, "--ckpt_path=last")
    assert (tmp_path / "run" / "samples.jsonl").read_text() == samples
    answers = {"initial": [], "last": []}
    for row in map(json.loads, samples.splitlines()):
        if row["phase"] in answers:
            answers[row["phase"]].append(row["answer"])
    assert answers["initial"] != answers["last"]
