"""vLLM's share of the trainer's GPU: numbers worked out by hand, refusals with a remedy, the printed explanation."""

import pytest

from pmd.bootstrap.random_model import make_random_model
from pmd.cli import main
from pmd.config.schema import ModelConfig, RolloutsConfig, RunConfig, VLLMConfig
from pmd.engines.make import GpuShare
from pmd.errors import ConfigError
from pmd.planning.engine_memory import (
    TRANSIENT,
    Cache,
    Gpu,
    engine_parts,
    fits_on,
    plan_engine,
    read_cache,
    refuse_small_cache,
    shares_base,
)
from pmd.planning.gpu_memory import Shape, Shards, predict

#: Linear layers: 2 x (100 x (2 x 100 + 2 x 50) + 3 x 100 x 200) = 180,000 weights; embedding 100,000.
SHAPE = Shape(layers=2, hidden=100, intermediate=200, query=100, key=50, vocabulary=1000, tied=True)
CACHE = Cache(layer_bytes=2 * 50 * 4, windows=(None, None), longest=1000)
TRAINER = {"base": 10e9, "gradients": 1e9, "optimizer": 2e9, "activations": 20e9, "logits chunk": 1e9}
GPU = Gpu(total=100e9, free=100e9)


def run_with(finetune="full", dtype="float32", **vllm) -> RunConfig:
    settings = {"parity_completions": 0, "enforce_eager": True, "max_num_seqs": 10, "sleep": True} | vllm
    return RunConfig(
        model=ModelConfig(path="tiny", finetune=finetune, dtype=dtype, lora_rank=4),
        rollouts=RolloutsConfig(engine="vllm", vllm=VLLMConfig(**settings)),
    )


@pytest.mark.parametrize(
    ("vllm", "gpu", "fraction"),
    [
        ({}, GPU, 0.82),  # 100 - (10 + 1 + 2) - 1.5 of context - 3 % = 82.5, rounded down
        ({"sleep": False}, GPU, 0.61),  # the step's 21 stay as well: 61.5
        ({"parity_completions": 4}, GPU, 0.81),  # a logits chunk of 1 and little else: 81.5
        ({}, Gpu(100e9, 50e9), 0.32),  # another program uses 50: 32.5
        ({"memory_fraction": 0.3}, GPU, 0.3),  # given
        ({}, Gpu(1000e9, 1000e9), 0.95),  # 95.5 % would leave no reserve
    ],
)
def test_the_fraction(vllm, gpu, fraction):
    plan = plan_engine(SHAPE, CACHE, run_with(**vllm), TRAINER, gpu)
    assert plan.fraction == fraction
    assert sum(plan.parts.values()) == pytest.approx(fraction * gpu.total)
    assert plan.is_automatic == ("memory_fraction" not in vllm)


@pytest.mark.parametrize(
    ("finetune", "dtype", "quantization", "weights", "adapters"),
    [
        ("full", "float32", "none", 280_000 * 4, 0),
        (
            "lora",
            "bfloat16",
            "none",
            280_000 * 2,
            2 * 8 * 2 * (200 + 300 + 200 + 900) * 2,
        ),  # reserved rank: 8
        ("lora", "bfloat16", "fp8", 180_000 + 200_000, 2 * 8 * 2 * 1600 * 2),
        ("lora", "bfloat16", "bitsandbytes", 180_000 * 0.5625 + 200_000, 2 * 8 * 2 * 1600 * 2),
    ],
)
def test_weights_and_adapters(finetune, dtype, quantization, weights, adapters):
    run = run_with(finetune, dtype, quantization=quantization)
    run.teacher.kind = "ema"
    parts = engine_parts(SHAPE, run, GPU)
    assert (parts["weights"], parts["adapters"], parts["CUDA graphs"]) == (weights, adapters, 0)
    assert parts["forward pass"] == 16384 * 3 * 300 * (4 if dtype == "float32" else 2) + 10 * 1000 * 16


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_every_part_of_the_trainer_is_either_kept_or_transient(finetune, engine):
    run = run_with(finetune)
    run.rollouts.engine = engine
    parts = predict(SHAPE, run, 1000, 100, "cuda")
    kept = {"base", "frozen copies", "adapters", "gradients", "optimizer"}
    assert {"base", "gradients", "optimizer"} <= set(parts) <= kept | set(TRANSIENT)


def test_a_plan_that_does_not_fit_is_refused_with_remedies():
    with pytest.raises(ConfigError) as refused:
        plan_engine(SHAPE, CACHE, run_with(sleep=False), TRAINER, Gpu(36e9, 36e9))
    for words in ("memory_fraction=null", "one sequence of 1000 tokens", "34.0", "sleep=true", "vllm_server"):
        assert words in str(refused.value)
    plan_engine(SHAPE, CACHE, run_with(sleep=True), TRAINER, Gpu(36e9, 36e9))


def test_a_shared_base_is_counted_once_and_stays_while_vllm_frees_its_cache():
    run = run_with("lora", "bfloat16")
    alone, shared = (plan_engine(SHAPE, CACHE, run, TRAINER, GPU, shares_weights=shares) for shares in (False, True))
    assert (alone.fraction, shared.fraction) == (0.82, 0.92)  # the trainer's 10 of base are vLLM's
    phases = shared.phases(TRAINER)
    assert "base" not in phases["training"] | phases["generating"]
    assert phases["training"]["vLLM: weights"] == phases["generating"]["vLLM: weights"] > 0
    assert "vLLM: KV cache" not in phases["training"]
    assert "vLLM: weights" not in alone.phases(TRAINER)["training"]
    assert "share one base; vLLM frees its KV cache" in str(shared)
    assert "each hold a base; vLLM sleeps while the policy trains, with 0.0 GB of weights in main memory" in str(alone)
    assert shared.share == GpuShare(0.92, shares_weights=True, sleeps=True)


def test_a_run_fits_on_gpus_that_hold_both_its_part_of_the_weights_and_vllm():
    run, tokens = run_with("full"), 1000
    vllm = sum(engine_parts(SHAPE, run, Gpu(1e9, 1e9)).values())
    fits = [fits_on(SHAPE, run, tokens, Gpu(size, size), Shards(2)) for size in (1.5e9, 2e9 + vllm, 20e9)]
    assert fits == [False, True, True]


@pytest.mark.parametrize(
    ("total", "sleeps"),
    [
        (36.8e9, True),  # 34 for the trainer, 1.5 of context, 3 %: .14 are left beside vLLM, and 256 sequences take .2
        (45.0e9, False),
    ],
)
def test_vllm_sleeps_on_its_own_only_if_step_and_cache_do_not_both_fit(total, sleeps):
    run = run_with(sleep="auto", max_num_seqs=256)
    run.rollouts.tasks_per_step, run.rollouts.group_size = 32, 8
    plan = plan_engine(SHAPE, CACHE, run, TRAINER, Gpu(total, total))
    assert plan.sleeps == sleeps
    assert set(plan.phases(TRAINER)) == ({"training", "generating"} if sleeps else {"always"})
    if not sleeps:
        assert plan.parts["KV cache"] >= 256 * CACHE.one_sequence
        assert "stays awake" in str(plan)


def test_sharing_that_is_asked_for_but_impossible_is_refused():
    run = run_with("full", share_weights=True)
    with pytest.raises(ConfigError, match=r"share_weights=true, but model\.finetune=full .*; use auto or false"):
        shares_base(run, on_gpu=True)
    assert shares_base(run_with("full"), on_gpu=True) == (False, [])
    assert shares_base(run_with("lora", share_weights=False), on_gpu=True) == (False, [])
    assert shares_base(run_with("lora"), on_gpu=True) == (True, [])
    shares, (line,) = shares_base(run_with("lora"), on_gpu=False)
    assert not shares
    assert "each hold a copy of the base: vLLM's CPU build repacks its weights" in line
    shares, (line,) = shares_base(run_with("lora"), on_gpu=True, divides=True)
    assert not shares
    assert "trainer.strategy=fsdp2 divides the trainer's base among the ranks" in line


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_needed_size():
    assert CACHE.one_sequence == 800_000
    refuse_small_cache(CACHE, run_with(kv_cache_memory_bytes=800_000))
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes=400000 holds 500 tokens.*at least 800000"):
        refuse_small_cache(CACHE, run_with(kv_cache_memory_bytes=400_000))


def test_a_layer_with_sliding_window_attention_caches_only_its_window(tmp_path):
    run = run_with(max_model_len=8192)
    run.model.path = str(make_random_model(tmp_path / "olmo", "olmo3"))
    cache = read_cache(run)
    assert (cache.longest, cache.windows) == (8192, (4096, 4096))
    assert cache.one_sequence == 2 * 4096 * cache.layer_bytes


def test_the_doctor_explains_the_plan_for_a_gpu_that_is_not_there(tmp_path, capsys):
    model = make_random_model(tmp_path / "model")
    arguments = ["doctor", "--config", "configs/qwen3_8b.yaml", f"--model.path={model}", "--memory.embedder=hash"]
    assert main([*arguments, "--gpu-gb=24"]) == 0  # all of so small a model fits, so vLLM need not sleep
    assert "GB, always" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--gpu-gb=24", "--rollouts.vllm.sleep=true"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in ("GB, training", "GB, generating", "vLLM: KV cache", "chosen from the plan", "It fits"):
        assert words in output
    assert main([*arguments, "--gpu-gb=2"]) == 1
    assert "vLLM does not fit beside it" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--gpu-gb=0"]) == 2
    assert "--gpu-gb=0.0 must be above 0" in capsys.readouterr().err
