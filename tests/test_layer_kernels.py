"""Where liger-kernel replaces a model's layers, they compute with its kernels on a GPU alone. Its stand-in has none."""

import copy
import sys
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch

from pmd.config.schema import ModelConfig
from pmd.pretrained import load_base

IDS = torch.arange(3, 20)[None]


def fused(module, inputs):
    assert inputs.is_cuda, "a CPU tensor reached a kernel"
    return f"{type(module).__name__} on a GPU"


def apply_to_instance(model, **_):
    """Replace what liger-kernel replaces in a Qwen3: all norms and MLPs."""
    for module in model.modules():
        if type(module).__name__ in ("Qwen3RMSNorm", "Qwen3MLP"):
            module.__dict__["forward"] = MethodType(fused, module)


@pytest.fixture
def with_liger(monkeypatch):
    transformers = ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = apply_to_instance
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)


@torch.no_grad()
def test_layers_go_by_the_device(with_liger):
    plain, replaced = (load_base(ModelConfig(path="tiny", layer_kernels=kernels)) for kernels in ("plain", "liger"))
    on_gpu = SimpleNamespace(is_cuda=True)
    assert replaced.model.norm(on_gpu) == "Qwen3RMSNorm on a GPU"
    assert replaced.model.layers[0].mlp(on_gpu) == "Qwen3MLP on a GPU"
    assert torch.equal(replaced(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights(with_liger):
    replaced = load_base(ModelConfig(path="tiny", layer_kernels="liger"))
    expected, teacher = replaced(input_ids=IDS).logits, copy.deepcopy(replaced)
    replaced.model.norm.weight.zero_()
    assert torch.equal(teacher(input_ids=IDS).logits, expected)
