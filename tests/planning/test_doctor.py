"""`pmd doctor`: exact numbers of weights, parts that follow the configuration, a verdict with a remedy."""

import re
from functools import partial
from pathlib import Path

import pytest

from pmd.cli import main
from pmd.cli.doctor import describe_hours
from pmd.config.load import load_config
from pmd.config.schema import ModelConfig, ObjectiveConfig, RunConfig, TeacherConfig
from pmd.planning.engine_memory import Gpu, fits_on
from pmd.planning.gpu_memory import (
    UNDIVIDED,
    Shape,
    Shards,
    num_gpus_needed,
    predict,
    read_shape,
    shards_of,
)
from pmd.policy import make_policy
from pmd.pretrained import load_base

QWEN3_8B = Shape(36, 4096, 12288, 4096, 1024, 151936, tied=False)


def test_the_number_of_weights_is_that_of_the_model():
    config = ModelConfig(path="tiny", finetune="lora", lora_rank=4)
    shape = read_shape(config)
    policy = make_policy(load_base(config), config, TeacherConfig())
    adapters = sum(p.numel() for n, p in policy.named_parameters() if ".student." in n)
    matrices = sum(p.numel() for n, p in policy.named_parameters() if ".student." not in n and p.ndim == 2)
    assert shape.adapter(4) == adapters
    assert shape.linear + shape.embedding == matrices


def test_parts_follow_the_configuration():
    config = ModelConfig(path="tiny")
    full = predict(read_shape(config), RunConfig(model=config), 10**6, 1000, "cpu")
    config = ModelConfig(path="tiny", finetune="lora", gradient_checkpointing=True)
    lora = predict(read_shape(config), RunConfig(model=config), 10**6, 1000, "cpu")
    assert full["frozen copies"] == full["base"]
    assert "frozen copies" not in lora
    assert lora["optimizer"] < full["optimizer"]


def test_divided_weights_need_several_gpus():
    """Qwen3-8B: everything that is trained or frozen is divided, adapters are not, and what is gathered is added."""
    full = load_config(["configs/qwen3_8b_full_8gpu.yaml"], ["rollouts.engine=hf", "rollouts.engine_batch=16"])
    shards, tokens = shards_of(full.trainer), 18_432
    assert shards == Shards(8, computes_in_bfloat16=True)
    whole, part = (predict(QWEN3_8B, full.run, tokens, tokens, "cuda", of) for of in (UNDIVIDED, shards))
    for name in ("base", "frozen copies", "gradients", "optimizer"):
        assert part[name] == whole[name] / 8
    assert part["gathered weights"] == 2 * (QWEN3_8B.linear + QWEN3_8B.embedding)  # to generate, in bfloat16
    for size, number in ((sum(part.values()), 8), (10e9, None)):
        fits = partial(fits_on, QWEN3_8B, full.run, tokens, Gpu(size, size))
        assert num_gpus_needed(fits, in_bfloat16=True) == number

    lora = load_config(["configs/qwen3_32b_fsdp.yaml"])
    whole, part = (predict(QWEN3_8B, lora.run, tokens, tokens, "cuda", of) for of in (UNDIVIDED, Shards(4)))
    assert part["base"] == whole["base"] / 4
    assert (part["adapters"], part["optimizer"]) == (whole["adapters"], whole["optimizer"])


@pytest.mark.parametrize(("dtype", "saves"), [("float32", False), ("bfloat16", True)])
def test_fused_layer_kernels_go_by_the_dtype_of_the_weights(dtype, saves):
    """Not by that in which layers compute, which is bfloat16 here both times: on a GPU, `auto` goes by the weights."""
    plain, auto = (
        predict(
            QWEN3_8B,
            load_config(
                ["configs/qwen3_8b_full_8gpu.yaml"],
                [
                    *("rollouts.engine=vllm_server", "model.gradient_checkpointing=false"),
                    *(f"model.dtype={dtype}", f"model.layer_kernels={kernels}"),
                ],
            ).run,
            *(18_432, 18_432, "cuda", Shards(8, computes_in_bfloat16=True)),
        )["activations"]
        for kernels in ("plain", "auto")
    )
    assert (auto < plain) == saves


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "One GPU is enough."),
        (("--trainer.strategy=fsdp2", "--trainer.devices=4"), "for each of 4 GPUs, which divide the weights"),
        (
            ("--trainer.strategy=fsdp2", "--trainer.devices=2", "--rollouts.engine=vllm"),
            "for each of 2 GPUs, which divide the weights. One GPU is enough.",
        ),
        (("--trainer.strategy=ddp", "--trainer.devices=2"), "with trainer.strategy=ddp, every one holds all of it"),
    ],
)
def test_the_doctor_says_for_how_many_gpus(options, words, capsys):
    assert main(["doctor", "--config", "configs/tiny.yaml", "--gpu-gb", "24", *options]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("tokens", "code", "words"), [("1000", 0, "It fits"), ("1000000000", 1, "micro_batch_tokens")])
def test_the_verdict(tokens, code, words, capsys):
    arguments = ["doctor", "--config", "configs/tiny.yaml", f"--tokens={tokens}"]
    assert main(arguments) == code
    output = capsys.readouterr().out
    assert words in output
    assert "Python and libraries" in output


@pytest.mark.parametrize(
    ("teacher", "kl_weight", "copies"),
    [("live", 0.0, 0), ("live", 0.1, 1), ("frozen", 0.1, 1), ("ema", 0.0, 1), ("ema", 0.1, 2)],
)
def test_frozen_copies_match_the_policys(teacher, kl_weight, copies):
    run = RunConfig(teacher=TeacherConfig(kind=teacher), objective=ObjectiveConfig(kl_weight=kl_weight))
    parts = predict(read_shape(run.model), run, 1000, 100, "cpu")
    policy = make_policy(load_base(run.model), run.model, run.teacher, needs_reference=kl_weight > 0)
    assert [policy.reference, policy.teacher].count(None) == 2 - copies
    assert parts["frozen copies"] == copies * parts["base"]


@pytest.mark.parametrize("name", ["qwen3_1_7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "olmo3_7b"])
def test_the_hours_in_a_configurations_header_are_predicted_by_the_doctor(name):
    path = Path("configs") / f"{name}.yaml"
    loaded = load_config([str(path)], [])
    (line,) = describe_hours(loaded.run, loaded.trainer)
    (said,) = re.findall(r"Time, predicted: (\d+ hours of one H200)", path.read_text())
    assert f"take {said}" in line
    assert describe_hours(loaded.run, {**loaded.trainer, "devices": 2, "strategy": "ddp"}) == []
