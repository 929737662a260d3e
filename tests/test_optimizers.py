"""The 8-bit optimizer (bitsandbytes runs it on a CPU, unpaged): steps like AdamW's, state in bytes, resumable."""

import pytest
import torch

from pmd.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from pmd.module import PMDModule
from pmd.planning.bench import measure_steps
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples

pytest.importorskip("bitsandbytes")
EXAMPLES = synthetic_examples(2, 2, Lengths(12, 20, 6, 6), 100)


def weights(module: PMDModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def trained(kind: str, steps: int) -> tuple[PMDModule, torch.Tensor]:
    """Return the module after some steps, and how its weights moved."""
    run = RunConfig(
        model=ModelConfig("tiny"),
        objective=ObjectiveConfig(alpha="symmetric"),
        optimizer=OptimizerConfig(kind, lr=1e-4),
    )
    module = PMDModule(run)
    before = weights(module)
    measure_steps(module, FixedBatches(EXAMPLES, steps), steps, "cpu")
    return module, weights(module) - before


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_it_steps_like_adamw():
    _, plain = trained("adamw", 4)
    module, small = trained("adamw_8bit_paged", 4)
    assert torch.nn.functional.cosine_similarity(plain, small, dim=0) > 0.98
    assert small.norm().item() == pytest.approx(plain.norm().item(), rel=0.05)
    state = module.trainer.optimizers[0].state
    large = [s["state1"] for p, s in state.items() if p.numel() >= 4096]
    assert large
    assert all(moment.dtype == torch.uint8 for moment in large)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_its_state_goes_into_a_checkpoint_and_back(tmp_path):
    module, _ = trained("adamw_8bit_paged", 2)
    module.trainer.save_checkpoint(tmp_path / "two.ckpt")
    kept = torch.load(tmp_path / "two.ckpt", weights_only=False)["optimizer_states"][0]
    fresh = module.configure_optimizers()["optimizer"]
    fresh.load_state_dict(kept)
    for parameter, expected in module.trainer.optimizers[0].state.items():
        for name, value in expected.items():
            found = fresh.state[parameter][name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
