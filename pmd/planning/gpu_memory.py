"""Predicts the memory of a training step, by part, from a model's config.json and the run's configuration.

Weights, gradients and optimizer state are counted exactly; the rest is what torch allocates for a Qwen3 layer with
scaled-dot-product attention, which a test compares with the allocations of a real step. Training and generation with
the `hf` engine take turns, so only the larger of the two is counted. Freed memory that the C library or the CUDA
allocator keeps is not included.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from pmd.config.processes import gathers_in_bfloat16, num_processes
from pmd.config.schema import MICRO_BATCH_TOKENS, ModelConfig, RunConfig
from pmd.losses.distillation import SLAB_TOKENS, chunk_size, kernel_chunk_size
from pmd.losses.fused import block_size
from pmd.planning.embedder_memory import embedder_bytes
from pmd.pretrained import DTYPES, load_model_config, uses_liger

#: Bytes per weight in NF4 with double quantisation: half a byte and the scales of its blocks.
NF4_BYTES = 0.516
#: How many activations of each width (hidden state, queries, keys, MLP) a Qwen3 layer saves per token for its backward
#: pass. Norms save float32.
SAVED_ACTIVATIONS = {
    ("full", "float32"): (6, 4, 4, 4),
    ("full", "bfloat16"): (8, 5, 5, 4),
    ("adapter", "float32"): (4, 3, 3, 4),
    ("adapter", "bfloat16"): (6, 4, 4, 4),
}
#: The same with liger-kernel's norms and SwiGLU, which save their inputs alone.
SAVED_BY_LIGER = (4, 3, 3, 3)
#: Additional tensors [block, V] in a comparison over the whole vocabulary, by alpha; the default is for 0 < alpha < 1.
VOCABULARY_TENSORS = {0.0: 3.25, 1.0: 3.25, "symmetric": 5.0}
DEFAULT_VOCABULARY_TENSORS = 7.25


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder, from its config.json."""

    layers: int
    hidden: int
    intermediate: int
    query: int  # heads x head_dim
    key: int  # key-value heads x head_dim
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Number of weights in the linear layers, without the output head."""
        attention = self.hidden * (2 * self.query + 2 * self.key)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        """Number of weights in the input embedding and, if it is a separate matrix, the output head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Number of weights in a LoRA adapter on all linear layers."""
        h, i, q, k = self.hidden, self.intermediate, self.query, self.key
        return self.layers * rank * ((h + q) + 2 * (h + k) + (q + h) + 3 * (h + i))


def read_shape(config: ModelConfig) -> Shape:
    """Read the architecture of `config.path` without its weights."""
    return shape_of(load_model_config(config))


def shape_of(architecture: PretrainedConfig) -> Shape:
    """Return the sizes of an architecture."""
    hf = architecture.get_text_config()
    head = hf.head_dim if "head_dim" in hf.to_dict() else hf.hidden_size // hf.num_attention_heads
    return Shape(
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        intermediate=hf.intermediate_size,
        query=hf.num_attention_heads * head,
        key=hf.num_key_value_heads * head,
        vocabulary=hf.vocab_size,
        tied=hf.tie_word_embeddings,
    )


def max_micro_batch_tokens(run: RunConfig) -> int:
    """Return the number of tokens, padding included, in the largest micro-batch that the configuration allows.

    `auto` counts as its value on a CPU; see choose_memory.py.
    """
    tokens = run.rollouts.micro_batch_tokens
    tokens = MICRO_BATCH_TOKENS if tokens == "auto" else tokens
    prompt = max(run.rollouts.max_prompt_tokens, run.teacher.max_prompt_tokens)
    longest = prompt + run.rollouts.max_new_tokens
    rollouts = run.rollouts.tasks_per_step * run.rollouts.group_size // run.rollouts.updates_per_batch
    return min(max(tokens, longest), rollouts * longest)


@dataclass(frozen=True, slots=True)
class Shards:
    """How the ranks of a run divide its weights (`trainer.strategy: fsdp2`)."""

    number: int = 1
    computes_in_bfloat16: bool = False  # gathers weights in bfloat16, whatever model.dtype (`trainer.precision`)

    def computed(self, run: RunConfig) -> RunConfig:
        """Return the run with the dtype in which its layers compute."""
        return replace(run, model=replace(run.model, dtype="bfloat16")) if self.computes_in_bfloat16 else run


#: One device has everything.
UNDIVIDED = Shards()


def shards_of(trainer: Mapping[str, Any]) -> Shards:
    """Return how the ranks of the `trainer` section divide weights."""
    if trainer.get("strategy") != "fsdp2":
        return UNDIVIDED
    return Shards(num_processes(trainer), gathers_in_bfloat16(trainer))


def predict(
    shape: Shape, run: RunConfig, tokens: int, completion_tokens: int, device: str, shards: Shards = UNDIVIDED
) -> dict[str, float]:
    """Return the predicted bytes by part, on one device.

    Args:
        tokens: tokens in the student's largest micro-batch, padding included.
        completion_tokens: how many of them are completion tokens, which are scored.
        shards: how weights are divided; adapters are not.
    """
    size = DTYPES[run.model.dtype].itemsize
    all_weights = shape.linear + shape.embedding
    parts = {"base": float(all_weights * size) / shards.number}
    trained_shards = shards.number if run.model.finetune == "full" else 1
    if run.model.finetune == "full":
        trained, trained_size = all_weights, size
        has_teacher = run.teacher.has_own_weights
        has_reference = run.objective.kl_weight > 0 or not (has_teacher or run.teacher.kind == "live")
        parts["frozen copies"] = float(all_weights * size * (has_teacher + has_reference)) / shards.number
    else:
        if run.model.finetune == "qlora":
            parts["base"] = shape.linear * NF4_BYTES + shape.embedding * size
        trained, trained_size = shape.adapter(run.model.lora_rank), 4
        parts["adapters"] = float(trained * trained_size * (2 if run.teacher.has_own_weights else 1))
    embedder = embedder_bytes(run.memory) if run.memory.embedder_device == device else 0.0
    if embedder:
        parts["embedder"] = embedder
    parts["gradients"] = float(trained * trained_size) / trained_shards
    parts["optimizer"] = 2.0 * trained * (1 if run.optimizer.kind == "adamw_8bit_paged" else trained_size)
    parts["optimizer"] /= trained_shards
    computed = shards.computed(run)
    computed_size = DTYPES[computed.model.dtype].itemsize
    fused = uses_liger(run.model, device)
    transient = _transient(shape, computed, tokens, completion_tokens, device, fused=fused)
    generating: dict[str, float] = dict(
        zip(("KV cache", "sampling"), _generation(shape, run, computed_size), strict=True)
    )
    if shards.number > 1:
        transient["gathered weights"] = _gathered(shape, run, computed_size)
        generating["gathered weights"] = float(all_weights * computed_size)
    if run.rollouts.engine == "hf" and sum(generating.values()) > sum(transient.values()):
        return parts | generating
    return parts | transient


def _gathered(shape: Shape, run: RunConfig, size: int) -> float:
    """Return the bytes of what is whole at the same time while ranks that divide the weights train.

    That is the layer that computes and the next one, the input embedding, and the output head once for the student and
    once for the teacher; if all weights are trained, also the gradients of a layer (`scoring_bytes` has the head's).

    Args:
        size: bytes of a gathered weight; the output head is gathered as it is.
    """
    layer, matrix = shape.linear / shape.layers, shape.vocabulary * shape.hidden
    heads = (1 + (run.objective.distillation > 0)) * DTYPES[run.model.dtype].itemsize
    gradients = layer if run.model.finetune == "full" else 0.0
    return size * (2 * layer + gradients + matrix) + heads * matrix


def num_gpus_needed(fits: Callable[[Shards], bool], *, in_bfloat16: bool = False) -> int | None:
    """Return the smallest power of two of GPUs among which the weights can be divided so that the run fits.

    None if no number is enough, because what is not divided is too large.
    """
    return next((shards.number for shards in (Shards(2**n, in_bfloat16) for n in range(11)) if fits(shards)), None)


def _transient(
    shape: Shape, run: RunConfig, tokens: int, completion_tokens: int, device: str, *, fused: bool
) -> dict[str, float]:
    """Return the peak bytes that exist only during a micro-batch: at the loss, or in a layer's backward pass.

    Args:
        fused: liger-kernel computes norms and SwiGLU.
    """
    model, size = run.model, DTYPES[run.model.dtype].itemsize
    kind = "full" if model.finetune == "full" else "adapter"
    counts = SAVED_BY_LIGER if fused else SAVED_ACTIVATIONS[kind, model.dtype]
    ranks = 0 if kind == "full" else 7 * 4 * model.lora_rank
    widths = (shape.hidden, shape.query, shape.key, shape.intermediate)
    layer = tokens * (size * sum(n * width for n, width in zip(counts, widths, strict=True)) + ranks)
    recomputed = recomputed_layers(shape, model)
    inputs = 0 if model.offload_activations else tokens * size * shape.hidden  # of a layer that is recomputed
    saved = recomputed * inputs + (shape.layers - recomputed) * layer
    ends = 3 * tokens * size * shape.hidden  # embedding, last norm
    backward = 2 * tokens * size * shape.intermediate + (layer if recomputed else 0)
    scoring = scoring_bytes(shape, run, completion_tokens, device)
    return {
        "activations": float(saved + ends),
        "logits chunk": scoring,
        "backward pass": max(0.0, backward - scoring),
    }


def recomputed_layers(shape: Shape, model: ModelConfig) -> int:
    """Return how many layers keep only their input for the backward pass."""
    if model.gradient_checkpointing == "selective":
        return (shape.layers + 1) // 2
    return shape.layers if model.gradient_checkpointing is True else 0


def scoring_bytes(shape: Shape, run: RunConfig, completion_tokens: int, device: str) -> float:
    """Return the bytes needed for scoring: logits of a chunk, work on a block, and the gradient of a trained head."""
    objective = run.objective
    compares = objective.distillation > 0
    over_vocabulary = compares and objective.top_k is None  # recomputed in the backward pass if the head is trained
    head = (4.0 if run.model.dtype == "float32" else 6.0) * shape.vocabulary * shape.hidden
    trained_head = head if run.model.finetune == "full" else 0.0
    if device == "cuda" and not over_vocabulary and objective.implementation == "fused":  # Triton's kernels
        rows = 4.0 * min(kernel_chunk_size(shape.vocabulary), completion_tokens)
        chunk = rows * shape.vocabulary
        if trained_head:
            return chunk + trained_head
        slab = compares * rows * min(SLAB_TOKENS, shape.vocabulary)
        return chunk + slab + 4.0 * completion_tokens * shape.hidden  # the last is the gradient of the hidden states
    chunk_tokens = chunk_size(device, shape.vocabulary)
    sizes = chunk_tokens, block_size(device, chunk_tokens)
    chunk, block = (4.0 * min(num_tokens, completion_tokens) * shape.vocabulary for num_tokens in sizes)
    work = VOCABULARY_TENSORS.get(objective.alpha, DEFAULT_VOCABULARY_TENSORS) * block if over_vocabulary else 0.0
    forward = (1 + compares) * (chunk + block) + work
    if run.model.finetune != "full":
        return forward
    return max(forward, (1 + over_vocabulary) * (chunk + block) + work + head)


def _generation(shape: Shape, run: RunConfig, size: int) -> tuple[float, float]:
    """Return the bytes of the hf engine's key-value cache, and of its logits and probabilities (float64)."""
    rollouts = run.rollouts
    rows = min(rollouts.engine_batch, rollouts.tasks_per_step * rollouts.group_size)
    length = rollouts.max_prompt_tokens + rollouts.max_new_tokens
    return float(rows * length * shape.layers * 2 * shape.key * size), float(rows * shape.vocabulary * 28)


def libraries_bytes() -> float:
    """Return the memory of this process on the CPU once everything that a step uses has been imported."""
    import torch
    from transformers import Qwen3ForCausalLM  # noqa: F401

    from pmd.planning.bench import peak_memory_bytes

    parameter = torch.nn.Parameter(torch.zeros(1))  # the first optimizer step imports more of torch
    optimizer = torch.optim.AdamW([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    return float(peak_memory_bytes(torch.device("cpu")))
