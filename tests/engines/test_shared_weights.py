"""The trainer's base made of vLLM's weights: equal to Hugging Face's own loading, without a copy; else refused."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pmd.config.schema import ModelConfig, RolloutsConfig, RunConfig, TeacherConfig, VLLMConfig
from pmd.engines.shared_weights import FusedWeights, NotShareable, share_weights, why_not_shared
from pmd.policy import make_policy
from pmd.pretrained import empty_base, load_base

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
VOCABULARY = 300  # vLLM pads it to 320
LAYOUTS = [(kind, tied) for kind in ("llama", "mistral", "olmo3", "qwen2", "qwen3") for tied in (False, True)]


def write(folder: Path, kind: str = "qwen3", tied: bool = False) -> ModelConfig:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=tied, **shape, attention_dropout=0.1,
        eos_token_id=5, pad_token_id=6, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # biases and norms as well
        torch.nn.init.normal_(parameter, std=0.3, mean=1.0 if "norm" in name else 0.0)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder), finetune="lora", lora_rank=2)


def fuse(model: PreTrainedModel) -> FusedWeights:
    """Join and pad the weights as vLLM does, into tensors of their own."""
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}  # a tied head only once
    tensors = {}
    for name, tensor in weights.items():
        *prefix, layer, kind = name.split(".")
        joined = next((whole for whole, parts in PACKED.items() if layer in parts), None)
        if joined is not None:
            parts = [weights[".".join([*prefix, part, kind])] for part in PACKED[joined]]
            tensors[".".join([*prefix, joined, kind])] = torch.cat(parts)
        elif layer in ("embed_tokens", "lm_head"):
            tensors[name] = pad(tensor, (0, 0, 0, -len(tensor) % 64))
        else:
            tensors[name] = tensor.clone()
    return FusedWeights(tensors, PACKED)


def shared_base(config: ModelConfig, fused: FusedWeights) -> PreTrainedModel:
    return share_weights(empty_base(config), fused, config)


@pytest.mark.parametrize(("kind", "tied"), LAYOUTS)
def test_the_model_equals_the_one_that_hugging_face_loads_and_no_weight_is_copied(tmp_path, kind, tied):
    config = write(tmp_path, kind, tied)
    loaded = load_base(config)
    fused = fuse(loaded)
    assert "model.layers.1.self_attn.qkv_proj.weight" in fused.tensors
    shared = shared_base(config, fused)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(shared(ids).logits, loaded(ids).logits)
    assert dict(shared.state_dict()).keys() == dict(loaded.state_dict()).keys()
    assert {n: b.tolist() for n, b in shared.named_buffers()} == {n: b.tolist() for n, b in loaded.named_buffers()}
    held = {tensor.untyped_storage().data_ptr() for tensor in fused.tensors.values()}
    assert {parameter.untyped_storage().data_ptr() for parameter in shared.parameters()} == held
    assert (shared.get_output_embeddings().weight is shared.get_input_embeddings().weight) == tied
    assert not shared.training
    assert shared.config.attention_dropout == 0.0
    assert shared.generation_config.eos_token_id == [5, 7]
    assert not any(parameter.requires_grad for parameter in shared.parameters())


def test_an_adapter_on_shared_weights_learns_what_one_on_a_copy_learns(tmp_path):
    config = write(tmp_path)
    fused = fuse(load_base(config))
    before = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    gradients = []
    for base in (shared_base(config, fused), load_base(config)):
        torch.manual_seed(1)
        policy = make_policy(base, config, TeacherConfig())
        with policy.weights("student") as model:
            model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        torch.optim.SGD(trained.values(), lr=1.0).step()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in fused.tensors.items())


def test_weights_in_another_form_are_refused(tmp_path):
    config = write(tmp_path)
    fused, norm = fuse(load_base(config)), "model.norm.weight"
    joined, head = "model.layers.0.mlp.gate_up_proj.weight", "lm_head.weight"
    wrong = {
        "no plain copy of model.layers.0.mlp.gate_proj.weight": {joined: torch.empty(0)},  # as on a CPU
        r"gate_proj.weight is \(24, 16\) .*gate_up_proj.weight \(49, 16\)": {joined: torch.zeros(49, 16)},
        r"gate_proj.weight is \(24, 16\) .*gate_up_proj.weight \(48, 8\)": {joined: torch.zeros(48, 8)},
        r"lm_head.weight is \(300, 16\) .* \(256, 16\)": {head: torch.zeros(256, 16)},
        r"norm.weight is \(16,\) .* \(17,\)": {norm: torch.zeros(17)},
    }
    for message, change in wrong.items():
        with pytest.raises(NotShareable, match=message):
            shared_base(config, FusedWeights({**fused.tensors, **change}, PACKED))
    without = {name: tensor for name, tensor in fused.tensors.items() if name != norm}
    with pytest.raises(NotShareable, match=r"no plain copy of model\.norm\.weight"):
        shared_base(config, FusedWeights(without, PACKED))


def test_what_cannot_be_shared_is_said_with_its_reason(tmp_path):
    def run(finetune="lora", quantization="none", kind="qwen3"):
        path = write(tmp_path / kind, kind).path if kind != "gpt2" else tmp_path / "gpt2"
        if kind == "gpt2":
            AutoConfig.for_model("gpt2").save_pretrained(path)
        vllm = VLLMConfig(quantization=quantization)
        return RunConfig(model=ModelConfig(path=str(path), finetune=finetune), rollouts=RolloutsConfig(vllm=vllm))

    assert why_not_shared(run()) is None
    assert "model.finetune=full" in why_not_shared(run("full"))
    assert "model.finetune=qlora" in why_not_shared(run("qlora"))
    assert "quantization=fp8" in why_not_shared(run(quantization="fp8"))
    assert "is gpt2, not one of llama, mistral, olmo3, qwen2, qwen3" in why_not_shared(run(kind="gpt2"))
