"""What `auto` means: the fastest way that fits the GPU, and exactly today's values on a CPU."""

from dataclasses import replace

import pytest

from pmd.config.schema import ModelConfig, RolloutsConfig, RunConfig, TeacherConfig, VLLMConfig
from pmd.planning.choose_memory import USED_SHARE, available_bytes, choose, choose_here
from pmd.planning.gpu_memory import Shape, predict

QWEN3_8B = Shape(layers=36, hidden=4096, intermediate=12288, query=4096, key=1024, vocabulary=151_936, tied=False)
GB = 1e9


def run_of(mode="auto", tokens="auto", *, longest=4096, tasks=8) -> RunConfig:
    return RunConfig(
        model=ModelConfig(dtype="bfloat16", finetune="lora", lora_rank=32, gradient_checkpointing=mode),
        teacher=TeacherConfig(max_prompt_tokens=longest - 1024),
        rollouts=RolloutsConfig(
            tasks_per_step=tasks, group_size=8, max_prompt_tokens=1024, max_new_tokens=1024, micro_batch_tokens=tokens,
            engine="vllm_server",
        ),
    )  # fmt: skip


def test_more_memory_means_less_recomputing():
    modes = [choose(QWEN3_8B, run_of(), size * GB).checkpointing for size in range(24, 300, 12)]
    assert modes == sorted(modes, key=[True, "selective", False].index)
    assert set(modes) == {True, "selective", False}


@pytest.mark.parametrize("size", [40, 80, 140])
@pytest.mark.parametrize("longest", [4096, 32768])
def test_what_is_chosen_is_predicted_to_fit_and_nothing_larger_is(size, longest):
    run = run_of(longest=longest)
    chosen = choose(QWEN3_8B, run, size * GB)
    if chosen.predicted > USED_SHARE * size * GB:  # nothing fits: the least that can be tried
        assert (chosen.checkpointing, chosen.micro_batch_tokens) == (True, longest)
        return
    assert chosen.micro_batch_tokens >= max(8192, longest)

    def predicted(tokens: int) -> float:
        return sum(predict(QWEN3_8B, chosen.applied(run), tokens, tokens, "cuda").values())

    assert chosen.predicted == predicted(chosen.micro_batch_tokens)
    if chosen.micro_batch_tokens < 32768:
        assert predicted(chosen.micro_batch_tokens + 1024) > USED_SHARE * size * GB


def test_a_step_of_few_tokens_needs_no_larger_micro_batch():
    assert choose(QWEN3_8B, run_of(longest=2048, tasks=1), 300 * GB).micro_batch_tokens == 8 * 2048


def test_values_that_are_set_stay():
    for mode in (True, False, "selective"):
        assert choose(QWEN3_8B, run_of(mode), 300 * GB).checkpointing == mode
    fixed = choose(QWEN3_8B, run_of(tokens=5000), 45 * GB)
    assert fixed.micro_batch_tokens == 5000
    assert fixed.checkpointing == "selective"
    run = run_of(True, 5000)
    assert choose_here(run) == (run, None)


def test_without_a_gpu_auto_is_what_it_always_was():
    run, line = choose_here(run_of())
    assert line is None
    assert (run.model.gradient_checkpointing, run.rollouts.micro_batch_tokens) == (False, 16384)
    assert choose_here(run_of("selective"))[0].model.gradient_checkpointing == "selective"


def test_offloading_keeps_no_layer_inputs_on_the_gpu():
    run = run_of(True, 16384)
    offloads = replace(run, model=replace(run.model, offload_activations=True))
    kept, less = (predict(QWEN3_8B, r, 16384, 16384, "cuda")["activations"] for r in (run, offloads))
    assert kept - less == 36 * 16384 * 4096 * 2


@pytest.mark.parametrize(("vllm", "taken"), [({"sleep": True}, 1.0), ({"sleep": False}, 40.0)])
def test_a_colocated_engine_has_its_share(vllm, taken):
    run = run_of()
    alone = available_bytes(run, 79 * GB, 80 * GB)
    beside = replace(run, rollouts=replace(run.rollouts, engine="vllm", vllm=VLLMConfig(**vllm)))
    assert alone - available_bytes(beside, 79 * GB, 80 * GB) == pytest.approx(taken * GB)


def test_one_line_says_what_was_chosen():
    line = str(choose(QWEN3_8B, run_of(True, 8192), 80 * GB))
    assert line.startswith(
        "Micro-batches of up to 8,192 tokens, every layer recomputed in the backward pass: a step is "
    )
    assert line.endswith(" of 80.0 GB.")
