"""The models that can be bootstrapped: how each is built, trained and probed. Imports torch."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from pmd.bootstrap.exam_model import make_exam_model, sharpen
from pmd.bootstrap.exam_probes import exam_probes
from pmd.bootstrap.exam_samples import draw_exam_sample
from pmd.bootstrap.exam_tokenizer import make_exam_tokenizer
from pmd.bootstrap.hard_probes import hard_probes
from pmd.bootstrap.hard_samples import draw_hard_sample
from pmd.bootstrap.probe import Probe
from pmd.bootstrap.sample import Sample
from pmd.bootstrap.tiny_model import TinySize, make_tiny_model
from pmd.bootstrap.tiny_probes import tiny_probes
from pmd.bootstrap.tiny_samples import Difficulty, draw_sample
from pmd.bootstrap.tiny_tokenizer import make_tokenizer
from pmd.bootstrap.train import DrawSample, Recipe, rounded_to_bfloat16
from pmd.tasks.prompts.hard_words import HARD_VOCABULARY

TINY_SIZES = {"tiny": TinySize(), "tiny_large": TinySize(layers=4, width=160)}
HARD_SIZES = {
    "tiny_hard": TinySize(width=96, vocabulary=HARD_VOCABULARY),
    "tiny_hard_large": TinySize(layers=4, width=128, vocabulary=HARD_VOCABULARY),
}


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything the `bootstrap` command needs to know about one model."""

    make_model: Callable[[int], Qwen3ForCausalLM]
    make_tokenizer: Callable[[], PreTrainedTokenizerBase]
    draw_sample: DrawSample
    recipe: Recipe
    finish: Callable[[Qwen3ForCausalLM], None]  # applied once, after training
    probes: Callable[[Qwen3ForCausalLM, int, int], list[Probe]]  # (model, number of samples, seed)
    probe_samples: int


def find_blueprint(name: str) -> Blueprint:
    """Return the blueprint of one of the models that the `bootstrap` command names."""
    if name in HARD_SIZES:
        return _tiny_hard(HARD_SIZES[name])
    return _tiny_exam() if name == "tiny_exam" else _tiny(TINY_SIZES[name])


def _tiny(size: TinySize) -> Blueprint:
    def draw(stream: random.Random, progress: float) -> Sample:
        return draw_sample(stream, Difficulty.at(progress))

    recipe = Recipe(steps=5200, tokens_per_batch=2000, matrix_lr=0.015, other_lr=4e-3, decay_from=0.35)

    def make(seed: int) -> Qwen3ForCausalLM:
        return make_tiny_model(seed, size)

    return Blueprint(make, make_tokenizer, draw, recipe, rounded_to_bfloat16, tiny_probes, probe_samples=1000)


def _tiny_hard(size: TinySize) -> Blueprint:
    def draw(stream: random.Random, progress: float) -> Sample:
        return draw_hard_sample(stream, Difficulty.at(progress))

    recipe = Recipe(steps=2600, tokens_per_batch=2000, matrix_lr=0.015, other_lr=4e-3, decay_from=0.35)

    def make(seed: int) -> Qwen3ForCausalLM:
        return make_tiny_model(seed, size)

    def tokenizer() -> PreTrainedTokenizerBase:
        return make_tokenizer(HARD_VOCABULARY)

    return Blueprint(make, tokenizer, draw, recipe, rounded_to_bfloat16, hard_probes, probe_samples=1000)


def _tiny_exam() -> Blueprint:
    tokenizer = make_exam_tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def draw(stream: random.Random, progress: float) -> Sample:
        return draw_exam_sample(encode, stream, progress)

    def finish(model: Qwen3ForCausalLM) -> None:
        sharpen(model)
        rounded_to_bfloat16(model)

    recipe = Recipe(steps=900, tokens_per_batch=6000, matrix_lr=0.02, other_lr=4e-3, pool=128)
    return Blueprint(make_exam_model, make_exam_tokenizer, draw, recipe, finish, exam_probes, probe_samples=300)
