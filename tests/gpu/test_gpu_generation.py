"""The embedded engine on a GPU, where prompts of a batch are padded on the left: its log-probs are those of scoring."""

import random

import pytest
import torch
from examples import random_ids
from gpu_model import make_gpu_model

from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import HFEngine
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer
from pmd.scoring import PolicyScorer

pytestmark = pytest.mark.gpu
DRAW = random.Random(0)
#: Padded to 64, to 65, and to much longer ones: kernels treat the ends of their tiles in ways of their own.
LENGTHS = [(1, 3, 64), (2, 33, 65), (5, 250, 320), (7, 7, 7)]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_padding_on_the_left_changes_nothing(tmp_path, attention, kernels):
    model = ModelConfig(
        path=str(make_gpu_model(tmp_path)),
        dtype="bfloat16",
        attention=attention,
        layer_kernels=kernels,
        finetune="lora",
    )
    policy, tokenizer = make_policy(load_base(model), model, TeacherConfig()).to("cuda"), load_tokenizer(model)
    engine, scorer = HFEngine(policy, tokenizer, 8), PolicyScorer(policy, tokenizer.pad_token_id, 10_000)
    for lengths in LENGTHS:
        requests = [Request(random_ids(DRAW, length), seed) for seed, length in enumerate(lengths)]
        found = dict(engine.generate(requests, Sampling(1.0, 40)))
        pairs = [(request.prompt_ids, found[position].token_ids) for position, request in enumerate(requests)]
        scores = scorer(pairs, "student")
        gaps = torch.tensor(
            [
                abs(one - other)
                for position, row in enumerate(scores)
                for one, other in zip(found[position].logprobs, row, strict=True)
            ]
        )
        assert gaps.isfinite().all()
        assert gaps.mean() < 0.03, lengths
        assert gaps.max() < 0.5, lengths


def test_generation_can_be_deterministic(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `trainer.deterministic` does
    model = ModelConfig(str(make_gpu_model(tmp_path)), "bfloat16", finetune="lora")
    policy = make_policy(load_base(model), model, TeacherConfig()).to("cuda")
    engine, requests = HFEngine(policy, load_tokenizer(model), 8), [Request(random_ids(DRAW, 20), n) for n in range(8)]
    plain = dict(engine.generate(requests, Sampling(1.0, 20, 0.9)))
    torch.use_deterministic_algorithms(True)
    try:
        found = dict(engine.generate(requests, Sampling(1.0, 20, 0.9)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert sum(found[n].token_ids == plain[n].token_ids for n in plain) >= 7  # rounding may move a draw
