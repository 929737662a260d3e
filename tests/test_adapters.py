"""Adapters on a base in half precision: as exact as PEFT's float32 products, without float32 copies of activations."""

import pytest
import torch
from examples import small_qwen
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from pmd.adapters import multiply_in_base_dtype
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.policy import Policy, make_policy

SCALING = 2.0


def policy_of(dtype: torch.dtype, dropout: float = 0.0) -> Policy:
    """A policy with an EMA teacher whose adapters are not zero."""
    torch.manual_seed(0)
    config = ModelConfig(finetune="lora", lora_rank=4, lora_alpha=4 * SCALING, lora_dropout=dropout)
    policy = make_policy(small_qwen(20, tie_word_embeddings=True).to(dtype), config, TeacherConfig(kind="ema"))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return policy


def layer_of(policy: Policy):
    return next(m for name, m in policy.named_modules() if isinstance(m, LoraLayer) and name.endswith("q_proj"))


def inputs_for(layer, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def far(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_result_and_gradients_are_those_of_float64_to_the_precision_of_bfloat16():
    layer = layer_of(policy_of(torch.bfloat16))
    inputs = inputs_for(layer, torch.bfloat16)
    out = layer(inputs)
    assert (out.shape, out.dtype) == ((2, 3, layer.out_features), torch.bfloat16)
    down, up = layer.lora_A["student"].weight, layer.lora_B["student"].weight
    weights = torch.randn(out.shape)
    found = torch.autograd.grad((out.float() * weights).sum(), [inputs, down, up])

    x, a, b = (tensor.detach().double().requires_grad_() for tensor in (inputs, down, up))
    exact = x @ layer.base_layer.weight.double().T + SCALING * (x @ a.T) @ b.T
    expected = torch.autograd.grad((exact * weights).sum(), [x, a, b])
    assert far(out, exact) < 4e-3
    assert all(far(one, other) < 8e-3 for one, other in zip(found, expected, strict=True))
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]


def test_nothing_of_an_activations_size_is_kept_in_float32():
    layer = layer_of(policy_of(torch.bfloat16))
    inputs, kept = inputs_for(layer, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs)
    assert any(tensor.numel() == inputs.numel() for tensor in kept)
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept)


def test_a_float32_base_keeps_pefts_own_forward_pass():
    kinds = {type(module) for module in policy_of(torch.float32).modules() if isinstance(module, LoraLayer)}
    assert kinds == {Linear}


def test_all_layers_share_one_forward_pass():
    """`torch.compile` would compile a forward pass for each layer, until it reaches its limit."""
    layers = [module for module in policy_of(torch.bfloat16).modules() if isinstance(module, LoraLayer)]
    assert len({type(layer) for layer in layers}) == 1
    assert not any("forward" in vars(layer) for layer in layers)
    assert isinstance(layers[0], Linear)


def test_each_role_has_its_own_adapter():
    policy = policy_of(torch.bfloat16)
    layer = layer_of(policy)
    inputs = inputs_for(layer, torch.bfloat16).detach()
    for role, name in (("student", "student"), ("teacher", "teacher"), ("reference", None)):
        with policy.weights(role), torch.no_grad():
            found = layer(inputs)
        exact = inputs.double() @ layer.base_layer.weight.double().T
        if name is not None:
            down, up = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            exact = exact + SCALING * (inputs.double() @ down.T) @ up.T
        assert far(found, exact) < 4e-3


def test_dropout_applies_in_training_only():
    policy = policy_of(torch.bfloat16, dropout=0.5)
    layer = layer_of(policy)
    inputs = inputs_for(layer, torch.bfloat16).detach()
    assert not torch.equal(layer(inputs), layer(inputs))
    policy.peft_model.eval()
    assert torch.equal(layer(inputs), layer(inputs))


def test_what_is_unusual_goes_to_peft():
    policy = policy_of(torch.bfloat16)
    layer = layer_of(policy)
    inputs = inputs_for(layer, torch.bfloat16).detach()
    before = layer(inputs)
    layer.merge()
    merged = layer(inputs)
    assert torch.equal(merged, layer.base_layer(inputs))
    assert far(merged, before.double()) < 1e-2
    layer.unmerge()


def test_a_4_bit_base_multiplies_in_its_compute_dtype():
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"))
    base = base.to("cpu")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    multiply_in_base_dtype(model)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    inputs, kept = inputs_for(layer, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = layer(inputs)
    weight = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    exact = inputs.double() @ weight.double().T
    exact = (
        exact
        + 2.0
        * (inputs.double() @ layer.lora_A["default"].weight.double().T)
        @ layer.lora_B["default"].weight.double().T
    )
    assert far(out, exact) < 8e-3
    assert not any(tensor.dtype == torch.float32 and tensor.numel() >= inputs.numel() for tensor in kept)
