"""Predicted memory is within 15 percent of what a training step allocates, whatever is trained and compared."""

import gc

import pytest
from torch.backends import mkldnn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pmd.config.schema import ModelConfig, ObjectiveConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.module import PMDModule
from pmd.planning.bench import measure_steps
from pmd.planning.gpu_memory import predict, read_shape
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples
from pmd.pretrained import resolve_model_path

ROWS, LENGTHS = 2, Lengths(96, 96, 64, 64)


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory) -> dict[str, str]:
    """A Qwen3 with grouped heads, and a vocabulary that is not negligible beside its layers; with each kind of head."""
    folders = {}
    for head in ("tied", "untied"):
        folders[head] = str(tmp_path_factory.mktemp(head))
        config = Qwen3Config(
            vocab_size=4000, hidden_size=128, intermediate_size=400, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=head == "tied",
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(folders[head])
        AutoTokenizer.from_pretrained(resolve_model_path("tiny")).save_pretrained(folders[head])
    return folders


def allocated_bytes(module: PMDModule, batches: FixedBatches) -> int:
    """Return the peak of what torch held at once: the weights, and the peak of what the steps allocate."""
    storages = {p.untyped_storage() for p in [*module.parameters(), *module.buffers()]}
    gc.collect()  # memory that earlier tests left would count as freed by this one
    # oneDNN's products of bfloat16 matrices take a float32 copy of the result where the CPU has no bfloat16.
    with mkldnn.flags(enabled=False), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        measure_steps(module, batches, 2, "cpu")  # the optimizer has its state in the second
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


OBJECTIVES = {
    "symmetric": ObjectiveConfig(alpha="symmetric"),
    "top-k": ObjectiveConfig(alpha=0.5, top_k=20),
    "whole vocabulary": ObjectiveConfig(alpha=0.5),
    "policy gradient": ObjectiveConfig(policy_gradient=1.0, distillation=0.0),
}
TRAINED = [
    ("full", "float32", "symmetric"),
    ("full", "bfloat16", "top-k"),
    ("lora", "float32", "whole vocabulary"),
    ("lora", "bfloat16", "top-k"),
    ("lora", "float32", "policy gradient"),
]
#: A head of its own matters to what is trained and kept; gradient checkpointing to the layers alone.
CASES = [
    *(("tied", checkpointing, *trained) for trained in TRAINED for checkpointing in (False, True)),
    *(("untied", False, *trained) for trained in TRAINED[:3]),
]


@pytest.mark.parametrize(("head", "checkpointing", "finetune", "dtype", "objective"), CASES)
def test_within_15_percent(model_paths, head, checkpointing, finetune, dtype, objective):
    model = ModelConfig(model_paths[head], dtype, finetune, lora_rank=8, gradient_checkpointing=checkpointing)
    rollouts = RolloutsConfig(
        tasks_per_step=2, group_size=4, max_prompt_tokens=8, max_new_tokens=8, share_prefixes="off"
    )
    run = RunConfig(model=model, objective=OBJECTIVES[objective], teacher=TeacherConfig(kind="ema"), rollouts=rollouts)
    batches = FixedBatches(synthetic_examples(2, ROWS // 2, LENGTHS, 100), 2)
    measured = allocated_bytes(PMDModule(run), batches)
    predicted = predict(read_shape(model), run, ROWS * 160, ROWS * 64, "cpu")
    assert sum(predicted.values()) == pytest.approx(measured, rel=0.15), predicted
