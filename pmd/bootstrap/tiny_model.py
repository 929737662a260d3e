"""The tiny models before training: a small Qwen3 with a planted induction circuit.

The planted heads are not a result of training, and we do not present them as one: from random weights, a model of this
size does not learn in this time to look up "the rule that followed this name". Three attention heads are therefore set
by hand before training, which then updates all weights. Layer 0, head 0 copies the previous token's embedding into the
upper half of the residual stream. Layer 1, heads 0 and 1 compare their own token with these copies, and so attend to
what followed the same token earlier. There are two of them because one head passes on only 32 dimensions, too few to
tell 30 rules apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.bootstrap.tiny_tokenizer import MAX_POSITIONS
from pmd.tasks.prompts.words import BOS, EOS, PAD, VOCABULARY

HEAD_WIDTH, THETA, INIT = 32, 1e4, 0.02
PAIRS = HEAD_WIDTH // 2  # rotary pairs: dimensions i and i + PAIRS rotate together
FAST_PAIRS = 5  # pairs that rotate too fast to compare distant tokens
OUTPUT_SCALE = INIT / 2**0.5  # writes a normalised embedding back at about its original size
CONSTANT = 0.25  # value of dimension 0 of every embedding, which the positional head uses to attend


@dataclass(frozen=True, slots=True)
class TinySize:
    """Layers, width and vocabulary of a tiny model."""

    layers: int = 3
    width: int = 128
    vocabulary: Sequence[str] = VOCABULARY

    @property
    def half(self) -> int:
        """Residual dimensions that hold embeddings; the others hold copies of the previous token."""
        return self.width // 2


def make_tiny_model(seed: int, size: TinySize = TinySize()) -> Qwen3ForCausalLM:
    """Build the model with its planted heads, in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(size.vocabulary),
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD_WIDTH,
        num_key_value_heads=size.width // HEAD_WIDTH,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INIT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=size.vocabulary.index(BOS),
        eos_token_id=size.vocabulary.index(EOS),
        pad_token_id=size.vocabulary.index(PAD),
    )
    model = Qwen3ForCausalLM(config)
    plant_induction_head(model, size.half)
    return model


@torch.no_grad()
def plant_induction_head(model: Qwen3ForCausalLM, half: int) -> None:
    """Overwrite three heads of the first two layers, and keep the embeddings out of the upper half."""
    embeddings = model.model.embed_tokens.weight
    embeddings[:, half:] = 0
    embeddings[:, 0] = CONSTANT
    reader = torch.linalg.qr(torch.randn(half - 1, HEAD_WIDTH))[
        0
    ].T  # [HEAD_WIDTH, half - 1], reads the embedding to copy
    writer = torch.linalg.qr(torch.randn(half, HEAD_WIDTH))[0]  # [half, HEAD_WIDTH], writes the copy
    _plant_previous_token_head(model.get_submodule("model.layers.0.self_attn"), reader, writer)
    _plant_matching_heads(model.get_submodule("model.layers.1.self_attn"), reader, writer)
    model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(0.3)  # keep the copies legible for layer 1


def _plant_previous_token_head(attention: torch.nn.Module, reader: Tensor, writer: Tensor) -> None:
    """Attend to the previous position: the query is the key, rotated by the angle of one step."""
    half = len(writer)
    query, key, value, output = _projections(attention)
    angles = THETA ** (-torch.arange(3).float() / PAIRS)
    query[:HEAD_WIDTH] = 0
    key[:HEAD_WIDTH] = 0
    query[0:3, 0] = torch.cos(-angles) * 0.2
    query[PAIRS : PAIRS + 3, 0] = torch.sin(-angles) * 0.2
    key[0:3, 0] = 0.2
    _set_sharpness(attention, 2.5)
    value[:HEAD_WIDTH] = 0
    value[:HEAD_WIDTH, 1:half] = reader
    output[:, HEAD_WIDTH:] *= 0.3  # the other heads start quieter
    output[:, :HEAD_WIDTH] = 0
    output[half:, :HEAD_WIDTH] = writer * OUTPUT_SCALE


def _plant_matching_heads(attention: torch.nn.Module, reader: Tensor, writer: Tensor) -> None:
    """Attend to positions whose previous token equals the current token; pass on their embedding."""
    half = len(writer)
    query, key, value, output = _projections(attention)
    slow = torch.ones(HEAD_WIDTH, 1)
    slow[0:FAST_PAIRS] = 0
    slow[PAIRS : PAIRS + FAST_PAIRS] = 0
    _set_sharpness(attention, 2.0)
    directions = torch.linalg.qr(torch.randn(half - 1, half - 1))[0]
    for head, passed_on in enumerate((directions[:HEAD_WIDTH], directions[HEAD_WIDTH:])):
        own = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        query[own] = 0
        query[own, 1:half] = reader * slow * 0.2
        key[own] = 0
        key[own, half:] = writer.T * slow * 0.2
        written = slice(own.start, own.start + len(passed_on))
        value[own] = 0
        value[written, 1:half] = passed_on
        output[:, own] = 0
        output[1:half, written] = passed_on.T * OUTPUT_SCALE


def _projections(attention: torch.nn.Module) -> list[Tensor]:
    """Return the weights of q, k, v and o, to be modified in place."""
    return [attention.get_submodule(f"{name}_proj").get_parameter("weight") for name in "qkvo"]


def _set_sharpness(attention: torch.nn.Module, gain: float) -> None:
    for name in ("q_norm", "k_norm"):
        attention.get_submodule(name).get_parameter("weight").fill_(gain)
