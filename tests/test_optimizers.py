"""The 8-bit optimizer (bitsandbytes runs it on a CPU, unpaged): steps like AdamW's, state in bytes, resumable."""

import copy

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


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_resumed_state_is_paged_as_new_state_is(tmp_path, monkeypatch):
    """Loading puts it where the weights are; memory that may move to the CPU is the optimizer's own."""
    module, _ = trained("adamw_8bit_paged", 2)
    optimizer = module.trainer.optimizers[0]
    kept, paged = copy.deepcopy(optimizer.state_dict()), []
    buffer = type(optimizer).get_state_buffer

    def note(self, parameter, dtype=torch.float32):
        paged.append(buffer(self, parameter, dtype))
        return paged[-1]

    monkeypatch.setattr(type(optimizer), "get_state_buffer", note)
    configure = module.configure_optimizers

    def resumed():
        found = configure()
        found["optimizer"].load_state_dict(kept)
        return found

    module.configure_optimizers = resumed
    module.objective.update_policy = False  # no step changes the state
    measure_steps(module, FixedBatches(EXAMPLES, 1), 1, "cpu")
    after = module.trainer.optimizers[0].state
    for parameter, expected in optimizer.state.items():
        for name in ("state1", "state2"):
            assert any(after[parameter][name] is one for one in paged)
            assert torch.equal(after[parameter][name], expected[name])
