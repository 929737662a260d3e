"""Predicts the memory of a training step, by part, from a model's config.json and the run's configuration.

Weights, gradients and optimizer state are counted exactly; the rest is what torch allocates for a Qwen3 layer with
scaled-dot-product attention, which a test compares with the allocations of a real step. Training and generation with
the `hf` engine take turns, so only the larger of the two is counted. Freed memory that the C library or the CUDA
allocator keeps is not included.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from pmd.config.schema import MICRO_BATCH_TOKENS, ModelConfig, RunConfig
from pmd.losses.distillation import SLAB_TOKENS, chunk_size, kernel_chunk_size
from pmd.losses.fused import block_size
from pmd.planning.embedder_memory import embedder_bytes
from pmd.pretrained import DTYPES, load_model_config

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


def predict(shape: Shape, run: RunConfig, tokens: int, completion_tokens: int, device: str) -> dict[str, float]:
    """Return the predicted bytes by part.

    Args:
        tokens: tokens in the student's largest micro-batch, padding included.
        completion_tokens: how many of them are completion tokens, which are scored.
    """
    size = DTYPES[run.model.dtype].itemsize
    all_weights = shape.linear + shape.embedding
    parts = {"base": float(all_weights * size)}
    if run.model.finetune == "full":
        trained, trained_size = all_weights, size
        has_teacher = run.teacher.has_own_weights
        has_reference = run.objective.kl_weight > 0 or not (has_teacher or run.teacher.kind == "live")
        parts["frozen copies"] = float(all_weights * size * (has_teacher + has_reference))
    else:
        if run.model.finetune == "qlora":
            parts["base"] = shape.linear * NF4_BYTES + shape.embedding * size
        trained, trained_size = shape.adapter(run.model.lora_rank), 4
        parts["adapters"] = float(trained * trained_size * (2 if run.teacher.has_own_weights else 1))
    embedder = embedder_bytes(run.memory) if run.memory.embedder_device == device else 0.0
    if embedder:
        parts["embedder"] = embedder
    parts["gradients"] = float(trained * trained_size)
    parts["optimizer"] = 2.0 * trained * (1 if run.optimizer.kind == "adamw_8bit_paged" else trained_size)
    transient = _transient(shape, run, tokens, completion_tokens, device)
    cache, sampling = _generation(shape, run, size)
    if run.rollouts.engine == "hf" and cache + sampling > sum(transient.values()):
        return parts | {"KV cache": cache, "sampling": sampling}
    return parts | transient


def _transient(shape: Shape, run: RunConfig, tokens: int, completion_tokens: int, device: str) -> dict[str, float]:
    """Return the peak bytes that exist only during a micro-batch: at the loss, or in a layer's backward pass."""
    model, size = run.model, DTYPES[run.model.dtype].itemsize
    kind = "full" if model.finetune == "full" else "adapter"
    counts, ranks = SAVED_ACTIVATIONS[kind, model.dtype], 0 if kind == "full" else 7 * 4 * model.lora_rank
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
