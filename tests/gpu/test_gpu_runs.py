"""A whole run on a GPU without vLLM: evaluation, training, evaluation, and the checkpoint evaluated and prompted."""

import json

import pytest
import torch
from gpu_model import make_gpu_model
from questions import make_questions

from pmd.cli import main

RUN = [
    "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml", "--rollouts.engine=hf",
    "--trainer.accelerator=gpu", "--trainer.max_epochs=1", "--model.dtype=bfloat16",
]  # fmt: skip


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_a_run_trains_and_its_checkpoint_is_tested_and_prompted(tmp_path, kernels):
    model, data = make_gpu_model(tmp_path / "qwen3"), make_questions(tmp_path, 24)
    run_dir = tmp_path / "run"
    of_run = [
        f"--model.path={model}",
        f"--data.path={data}",
        f"--run_dir={run_dir}",
        f"--model.layer_kernels={kernels}",
    ]
    assert main(["fit", *RUN, *of_run]) == 0
    assert json.loads((run_dir / "results.json").read_text())["device"] == "cuda"
    torch.cuda.reset_peak_memory_stats()
    assert main(["test", *RUN, *of_run, "--ckpt_path=last"]) == 0
    assert (run_dir / "test-last" / "results.json").is_file()
    assert torch.cuda.max_memory_allocated() > 0  # it was not evaluated on the CPU
    assert main(["generate", str(run_dir), "--prompt", "Which one?", "--max-new-tokens", "4"]) == 0
