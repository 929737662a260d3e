"""`pmd bench`: the parts add up to the step, tokens are counted as the models process them, JSON has all figures."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from pmd.batch import Batch, BatchLayout
from pmd.cli import main
from pmd.config.schema import ModelConfig, RunConfig
from pmd.module import PMDModule
from pmd.planning import bench, synthetic
from pmd.planning.bench import count_tokens, measure_steps, summarise
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples

SMALL = ["--rollouts.tasks_per_step=2", "--rollouts.group_size=2", "--data.world.train_per_family=1"]


@pytest.mark.parametrize("lengths", [[], ["--random-init", "--prompt-tokens=20", "--completion-tokens=6"]])
def test_a_step_is_measured_by_part(lengths, tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["bench", "--config", "configs/tiny.yaml", "--steps=1", f"--json={out}", *SMALL, *lengths]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert sum(result["seconds"].values()) == pytest.approx(result["step_s"], abs=1e-3)
    expected = {"teacher", "student", "backward", "optimizer"} | (set() if lengths else {"rollout", "verify"})
    assert expected <= set(result["seconds"])
    if lengths:
        assert result["tokens_per_step"] == 4 * 26
    assert result["tokens_per_s"] == pytest.approx(result["tokens_per_step"] / result["step_s"])
    assert result["mfu"] is None
    assert result["tflops_per_s"] > 0


def test_steps_are_measured_in_the_precision_of_the_run(monkeypatch):
    seen = set()
    measured = bench.measure_steps

    def measure(module, *arguments, **named):
        module.policy.student.model.norm.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
        return measured(module, *arguments, **named)

    monkeypatch.setattr(bench, "measure_steps", measure)
    arguments = ["--config", "configs/tiny.yaml", "--steps=1", *SMALL, "--random-init", "--prompt-tokens=20"]
    for precision, autocasts in (("32-true", False), ("bf16-mixed", True)):
        seen.clear()
        assert main(["bench", *arguments, f"--trainer.precision={precision}"]) == 0
        assert seen == {autocasts}


def test_the_memory_of_random_weights_made_on_a_gpu_is_given_back(tmp_path, monkeypatch):
    """Before vLLM and micro-batches are given a share of what is free."""
    calls = []
    cuda = SimpleNamespace(is_available=lambda: True, empty_cache=lambda: calls.append("given back"))
    stand_in = SimpleNamespace(
        cuda=cuda, manual_seed=torch.manual_seed, device=lambda kind: calls.append(kind) or nullcontext()
    )
    monkeypatch.setattr(synthetic, "torch", stand_in)
    synthetic.write_random_model(ModelConfig(path="tiny"), tmp_path / "model")
    assert calls == ["cuda", "given back"]


class MovesModule(Callback):
    """Moves the module to another device in teardown, as Lightning does after training on a GPU."""

    def teardown(self, trainer, pl_module, stage):
        pl_module.to("meta")


def test_the_device_is_read_before_the_teardown():
    module = PMDModule(RunConfig(model=ModelConfig(path="tiny")))
    examples = synthetic_examples(1, 2, Lengths(8, 12, 3, 3), 100)
    result = summarise(measure_steps(module, FixedBatches(examples, 1), 1, "cpu", [MovesModule()]))
    assert module.device.type == "meta"
    assert result["device"] == "cpu"
    assert result["peak_memory_gb"] > 0
    assert result["tflops_per_s"] > 0


def test_a_shared_prompt_is_counted_once():
    examples = synthetic_examples(2, 4, Lengths(200, 300, 5, 5), 100)
    counts = {
        share: count_tokens(Batch(tuple(examples), 0, 0), BatchLayout(10_000, 0, 1.0, "token", frozenset(sides)))
        for share, sides in (("off", ()), ("both", ("student", "teacher")))
    }
    assert (counts["off"].student, counts["off"].teacher) == (8 * 205, 8 * 305)
    assert (counts["both"].student, counts["both"].teacher) == (2 * (199 + 4 * 6), 2 * (299 + 4 * 6))
    assert counts["off"].sequences == counts["both"].sequences == 8 * 205
    assert counts["off"].completion == 40


def test_a_bad_argument_is_refused(capsys):
    assert main(["bench", "--config", "configs/tiny.yaml", "--stepss", "3"]) == 2
    assert "--stepss is not an option of bench; did you mean --steps?" in capsys.readouterr().err


def test_the_8_bit_optimizer_needs_cuda(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["bench", "--config", "configs/tiny.yaml", "--optimizer.kind=adamw_8bit_paged"]) == 2
    assert "optimizer.kind=adamw_8bit_paged needs a CUDA device" in capsys.readouterr().err
