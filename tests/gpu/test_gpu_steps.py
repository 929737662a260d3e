"""One training step on a GPU equals the same step on the CPU, whatever the method, the layout and the loss."""

from collections.abc import Sequence

import pytest
import torch
from examples import examples_of_one_prompt, varied_examples
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from pmd.batch import Batch, Example
from pmd.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.module import PMDModule, combined_loss, page_again

METHODS = {
    "grpo": (ObjectiveConfig(policy_gradient=1.0, distillation=0.0, kl_weight=0.1), TeacherConfig()),
    "sdpo": (ObjectiveConfig(alpha=0.5, top_k=20, reduction="sequence", no_context_weight=0.0), TeacherConfig("ema")),
    "pmd": (ObjectiveConfig(alpha=1.0), TeacherConfig()),
    "trust region": (ObjectiveConfig(alpha="symmetric"), TeacherConfig("trust_region")),
}


def module_of(method: str, finetune: str = "lora", *, share: str = "both", **model: object) -> PMDModule:
    """Return a module on the tiny model whose adapters already differ from zero."""
    objective, teacher = METHODS[method]
    run = RunConfig(
        model=ModelConfig(path="tiny", finetune=finetune, lora_rank=4, **model), objective=objective, teacher=teacher,
        optimizer=OptimizerConfig(lr=1e-3), rollouts=RolloutsConfig(micro_batch_tokens=400, share_prefixes=share),
    )  # fmt: skip
    module = PMDModule(run)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return module


def gradient(module: PMDModule, examples: Sequence[Example], device: str) -> tuple[float, Tensor]:
    """Return the step's loss, and the gradient of everything trained as one vector on the CPU, in float64."""
    module.to(device).zero_grad()
    total = 0.0
    for micro_batch in Batch(tuple(examples), 0, 0).micro_batches(module.layout, torch.device(device)):
        loss = combined_loss(module._score(micro_batch), micro_batch.tokens, 0, module.objective)
        loss.total.backward()
        total += loss.parts["loss/total"]
    parts = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return total, torch.cat(parts).double().cpu()


def assert_equal(one: tuple[float, Tensor], other: tuple[float, Tensor], tolerance: float = 2e-4) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=1e-6)
    assert other[1].norm() > 0
    assert (one[1] - other[1]).norm() <= tolerance * other[1].norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_cuda_equals_the_cpu(method, finetune):
    examples = [*varied_examples(), *examples_of_one_prompt(4)]
    on_cpu = gradient(module_of(method, finetune), examples, "cpu")
    assert_equal(gradient(module_of(method, finetune), examples, "cuda"), on_cpu)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_shared_equal_rows_padded(method):
    examples = examples_of_one_prompt()
    padded = gradient(module_of(method, share="off"), examples, "cuda")
    for share in ("teacher", "both"):
        assert_equal(gradient(module_of(method, share=share), examples, "cuda"), padded)


@pytest.mark.parametrize("method", METHODS)
def test_the_fused_loss_equals_the_reference(method):
    found = []
    for implementation in ("fused", "reference"):
        module = module_of(method)
        module.objective.implementation = implementation
        found.append(gradient(module, varied_examples(), "cuda"))
    METHODS[method][0].implementation = "fused"
    assert_equal(*found)


def test_gradient_checkpointing_changes_nothing():
    kept = gradient(module_of("sdpo"), varied_examples(), "cuda")
    assert_equal(gradient(module_of("sdpo", gradient_checkpointing=True), varied_examples(), "cuda"), kept)


def test_bfloat16_stays_close_to_float32():
    exact = gradient(module_of("sdpo"), varied_examples(), "cuda")
    rounded = gradient(module_of("sdpo", dtype="bfloat16"), varied_examples(), "cuda")
    assert torch.nn.functional.cosine_similarity(exact[1], rounded[1], dim=0) > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_ligers_kernels_equal_plain_ones(method):
    pytest.importorskip("liger_kernel")
    plain, fused = (
        gradient(module_of(method, dtype="bfloat16", layer_kernels=kernels), varied_examples(), "cuda")
        for kernels in ("plain", "liger")
    )
    assert fused[0] == pytest.approx(plain[0], rel=0.05, abs=1e-3)
    assert torch.nn.functional.cosine_similarity(plain[1], fused[1], dim=0) > 0.98


def test_a_model_on_the_cpu_keeps_its_own_kernels_beside_ligers():
    pytest.importorskip("liger_kernel")
    gradient(module_of("sdpo", dtype="bfloat16", layer_kernels="liger"), varied_examples(), "cuda")
    beside = gradient(module_of("sdpo"), varied_examples(), "cpu")
    assert beside[1].isfinite().all()


def fit(module: PMDModule, steps: int = 3) -> Tensor:
    """Take steps under Lightning on the GPU; return how the trained weights moved."""
    trained = [p for p in module.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().cpu() for p in trained])
    batches = [Batch(tuple(varied_examples()), 0, step, {"rollout/reward": 0.5}) for step in range(steps)]
    Trainer(
        max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(batches, batch_size=None))  # fmt: skip
    return torch.cat([p.detach().flatten().cpu() for p in trained]) - before


def test_the_module_stays_on_the_gpu_after_training():
    module = module_of("pmd")
    assert fit(module).norm() > 0
    assert {parameter.device.type for parameter in module.parameters()} == {"cuda"}
    assert module.device.type == "cuda"


def test_the_8_bit_paged_optimizer_steps_like_adamw():
    pytest.importorskip("bitsandbytes")
    moves = []
    for kind in ("adamw", "adamw_8bit_paged"):
        module = module_of("pmd", "full")
        module.optimizer_config = OptimizerConfig(kind, lr=1e-4)
        moves.append(fit(module, 4))
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.95
    assert moves[0].norm().item() == pytest.approx(moves[1].norm().item(), rel=0.1)


def test_the_paged_state_of_a_resumed_run_may_leave_the_gpu_again():
    bnb = pytest.importorskip("bitsandbytes")
    weights = torch.nn.Parameter(torch.randn(400, 400, device="cuda"))
    first, resumed = (bnb.optim.PagedAdamW8bit([weights], lr=1e-3) for _ in range(2))
    weights.grad = torch.randn_like(weights)
    first.step()
    resumed.load_state_dict(first.state_dict())
    assert not hasattr(resumed.state[weights]["state1"], "is_paged")
    page_again(resumed)
    for name in ("state1", "state2"):
        assert resumed.state[weights][name].is_paged
        assert torch.equal(resumed.state[weights][name], first.state[weights][name])
    resumed.step()
    assert weights.isfinite().all()


def test_qlora_trains_its_adapter_and_keeps_its_base():
    pytest.importorskip("bitsandbytes")
    module = module_of("pmd", "qlora", dtype="bfloat16")
    packed = {name: p.clone() for name, p in module.named_parameters() if p.dtype == torch.uint8}
    assert packed
    moved = fit(module)
    assert moved.isfinite().all()
    assert moved.norm() > 0
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name].cpu(), weight.cpu()) for name, weight in packed.items())
