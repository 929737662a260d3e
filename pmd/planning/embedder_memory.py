"""Predicts the memory of a sentence embedder (`memory.embedder`) from its configuration, without its weights."""

import json
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from pmd.config.schema import MemoryConfig
from pmd.errors import ConfigError
from pmd.hub import prepare_hub
from pmd.memory.embed import BATCH_TEXTS, MAX_TOKENS
from pmd.pretrained import DTYPES

#: Activations of a layer that exist at once, of the width of the hidden state and of the MLP.
HIDDEN_TENSORS, MLP_TENSORS = 6, 3


def embedder_bytes(config: MemoryConfig) -> float:
    """Return the predicted bytes of the embedder: its weights, exactly, and the activations of one batch, at most.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    if not config.enabled or config.embedder == "hash":
        return 0.0
    return _bytes_of(config.embedder, config.embedder_device)


@cache
def _bytes_of(embedder: str, device: str) -> float:
    architecture = _read_architecture(embedder)
    with torch.device("meta"):
        model = AutoModel.from_config(architecture)
    size = 4 if device == "cpu" else DTYPES.get(str(architecture.dtype).removeprefix("torch."), torch.float32).itemsize
    text = architecture.get_text_config()
    width = HIDDEN_TENSORS * text.hidden_size + MLP_TENSORS * text.intermediate_size
    tokens = BATCH_TEXTS * min(MAX_TOKENS, text.max_position_embeddings)
    return float(size * (sum(weights.numel() for weights in model.parameters()) + tokens * width))


def _read_architecture(path: str) -> PretrainedConfig:
    prepare_hub(path)
    folder = Path(path).expanduser()
    modules = folder / "modules.json"
    try:
        if modules.is_file():  # the transformer may be in a folder of its own
            folder = folder / json.loads(modules.read_text(encoding="utf-8"))[0]["path"]
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"memory.embedder={path}: its configuration cannot be read ({str(error).splitlines()[0][:200]}); give the "
            "folder or Hugging Face id of a sentence-transformers model, or hash."
        ) from error
