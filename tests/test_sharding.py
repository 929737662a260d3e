"""Divided weights take half the room on each of two ranks, and give the gradients of whole ones.

The model has an output head of its own, unlike the shipped ones; layers are recomputed, or not.
"""

import numpy as np
import torch
from examples import small_qwen
from rank_processes import on_ranks

from pmd.batch import pad_sequences
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.policy import make_policy
from pmd.pretrained import prepare_base
from pmd.ranks import Ranks
from pmd.scoring import score
from pmd.sharding import own_part, whole

#: Prompts with completions.
PAIRS = [((5, 6, 7), (8, 9)), ((5, 6, 7, 11, 12), (3,))]


def gradients(finetune: str, recomputes: bool, ranks: Ranks | None) -> dict[str, np.ndarray]:
    """Return the gradient of all completions' log-probs; of two ranks, each scores one."""
    config = ModelConfig(finetune=finetune, lora_rank=2, gradient_checkpointing=recomputes)
    torch.manual_seed(1)
    policy = make_policy(prepare_base(small_qwen().double(), config), config, TeacherConfig("live")).double()
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:  # else A has no gradient
            torch.nn.init.normal_(parameter)
    if ranks is not None:
        size, kept = (sum(p.numel() for p in weights) for weights in (policy.parameters(), policy.adapters()))
        before = {name: weight.clone() for name, weight in policy.model_of("student").state_dict().items()}
        policy.shard(ranks)
        assert sum(own_part(p.detach()).numel() for p in policy.parameters()) == (size - kept) / 2 + kept
        model = policy.model_of("student")
        assert all(weight.equal(before[name]) for name, weight in policy.whole_weights(model))
    for pair in PAIRS if ranks is None else [PAIRS[ranks.rank]]:
        score(policy, pad_sequences([pair], 0, torch.device("cpu"))).student_logprobs.sum().backward()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if ranks is not None and finetune == "lora":  # adapters are not divided
        ranks.sum_gradients(trained.values())
    return {name: whole(p.grad).numpy() for name, p in trained.items()}


def test_gradients_are_those_of_whole_weights(tmp_path):
    cases = [(finetune, recomputes) for finetune in ("full", "lora") for recomputes in (False, True)]

    def act(ranks: Ranks | None):
        return [gradients(*case, ranks) for case in cases]

    alone = act(None)
    for found in on_ranks(2, tmp_path, act, shards=True):
        for case, part, expected in zip(cases, found, alone, strict=True):
            assert part.keys() == expected.keys()
            for name, gradient in expected.items():
                np.testing.assert_allclose(part[name], gradient, rtol=0, atol=1e-12, err_msg=f"{case} {name}")
                assert np.abs(gradient).max() > 1e-6
