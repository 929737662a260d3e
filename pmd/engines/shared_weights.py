"""One base for trainer and vLLM: a Hugging Face model whose weights are views of those that vLLM holds.

vLLM joins the matrices that are applied to the same input (`qkv_proj`, `gate_up_proj`), one block of rows after the
other, and pads embedding and output head to a multiple of 64 rows. So every matrix of the checkpoint is a contiguous
block of rows of one of vLLM's, and norms and the remaining matrices are the same tensors. Nothing is copied.

Whoever shares the weights must not change them: only adapters are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmd.config.schema import ModelConfig, RunConfig
from pmd.errors import EngineError
from pmd.pretrained import load_model_config, prepare_base

#: Values of `model_type` for which the views are tested against Hugging Face's own loading.
SHAREABLE = ("llama", "mistral", "olmo3", "qwen2", "qwen3")
EMBEDDING = "model.embed_tokens.weight"


class NotShareable(EngineError):
    """vLLM does not hold the weights in a form that the trainer can use."""


@dataclass(frozen=True, slots=True)
class FusedWeights:
    """The weights of vLLM's model."""

    tensors: Mapping[str, Tensor]  # by vLLM's name, without the wrappers of adapters
    packed: Mapping[str, Sequence[str]]  # name of a joined layer -> names of its parts, in the order of their rows


def why_not_shared(run: RunConfig) -> str | None:
    """Return why trainer and vLLM must each hold a copy of the base; None if they can share one."""
    if run.model.finetune != "lora":
        return f"model.finetune={run.model.finetune} does not keep the base as vLLM does"
    if run.rollouts.vllm.quantization != "none":
        return f"rollouts.vllm.quantization={run.rollouts.vllm.quantization} changes vLLM's base"
    kind = load_model_config(run.model).model_type
    if kind not in SHAREABLE:
        return f"the architecture of model.path={run.model.path} is {kind}, not one of {', '.join(SHAREABLE)}"
    return None


def share_weights(base: PreTrainedModel, fused: FusedWeights, config: ModelConfig) -> PreTrainedModel:
    """Give a base without weights (`empty_base`) those of vLLM; return it, frozen and in eval mode.

    Raises:
        NotShareable: some weight is not to be found in vLLM's model.
    """
    views = views_by_name(fused, {name: tensor.shape for name, tensor in base.state_dict().items()})
    base.load_state_dict(views, assign=True)
    base.tie_weights()
    nn.Module.to(base, next(iter(views.values())).device)  # moves what was computed, such as rotary frequencies
    return prepare_base(base.requires_grad_(False), config)


def views_by_name(fused: FusedWeights, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return a view of vLLM's weights for every tensor of the checkpoint.

    Args:
        shapes: of the checkpoint's tensors, by Hugging Face's name; a tied output head is one of them.

    Raises:
        NotShareable: a tensor is missing, or has another shape.
    """
    views = {}
    for name, shape in shapes.items():
        owner, start, num_rows = _place(fused, shapes, name)
        whole = fused.tensors.get(owner)
        if whole is None or not whole.numel():  # on a CPU vLLM repacks matrices and drops the originals
            raise NotShareable(f"vLLM holds no plain copy of {name}")
        fits = num_rows <= len(whole) if _per_token(name) else num_rows == len(whole)
        if not fits or whole.shape[1:] != shape[1:]:
            raise NotShareable(f"{name} is {tuple(shape)} in the checkpoint, and vLLM's {owner} {tuple(whole.shape)}")
        views[name] = whole.detach()[start : start + shape[0]]
    return views


def _place(fused: FusedWeights, shapes: Mapping[str, torch.Size], name: str) -> tuple[str, int, int]:
    """Return which of vLLM's tensors holds the tensor `name`, from which row on, and how many rows it should have."""
    *prefix, layer, kind = name.split(".")
    rows = shapes[name][0]
    if name in fused.tensors:
        return name, 0, rows
    if layer == "lm_head":  # tied: vLLM names the embedding alone
        return EMBEDDING, 0, rows
    for joined, parts in fused.packed.items():
        if layer in parts:
            sizes = [shapes[".".join([*prefix, part, kind])][0] for part in parts]
            before = sizes[: list(parts).index(layer)]
            return ".".join([*prefix, joined, kind]), sum(before), sum(sizes)
    return name, 0, rows


def _per_token(name: str) -> bool:
    """Whether the matrix has one row per token of the vocabulary; vLLM pads those."""
    return name.split(".")[-2] in ("embed_tokens", "lm_head")
