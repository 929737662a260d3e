"""vLLM, SGLang and llama.cpp read exported adapters and merged models, and see the numbers of PEFT and transformers.

SGLang need only be importable: its reader of adapters runs on a CPU. For llama.cpp, install llama-cpp-python, gguf and
sentencepiece (the converters need them), and set LLAMA_CPP to a checkout of llama.cpp; the source distribution of
llama-cpp-python holds one (`vendor/llama.cpp`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pmd.bootstrap.random_model import HEAD_DIM, SHAPE, make_random_model
from pmd.cli.export import merge_adapter, save_student
from pmd.config.schema import ModelConfig, RunConfig
from pmd.module import PMDModule

#: Prints the log-probability of each token of a prompt but the first, with an adapter if one is named; needs no pmd.
WITH_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = LLM(base, dtype="float32", enforce_eager=True, max_model_len=64, gpu_memory_utilization=0.4, enable_lora=True,
            max_lora_rank=8, enable_chunked_prefill=False, enable_prefix_caching=False)
lora = LoRARequest("student", 1, adapter) if adapter else None
(done,) = model.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=lora)
print(json.dumps([step[token].logprob for token, step in zip(ids[1:], done.prompt_logprobs[1:])]))
"""
TEXT = "What is 13 + 8? The answer is"


def export(base: Path, out: Path) -> tuple[Path, Path]:
    """Write an adapter with random weights and the model that it makes of its base, as `pmd export` does."""
    config = ModelConfig(path=str(base), finetune="lora", lora_rank=4, dtype="float32")
    module = PMDModule(RunConfig(model=config))
    torch.manual_seed(1)
    for name, weights in module.named_parameters():
        if "lora_B.student" in name:
            torch.nn.init.normal_(weights, std=0.1)
    for folder in (out / "adapter", out / "merged"):
        folder.mkdir(parents=True)
        save_student(module, folder, is_adapter=True)
    merge_adapter(out / "merged", config)
    return out / "adapter", out / "merged"


@pytest.mark.vllm
def test_vllm_serves_the_adapter_on_its_base_and_the_merged_model(tmp_path):
    base = make_random_model(tmp_path / "base")
    adapter, merged = export(base, tmp_path)
    ids = list(range(3, 23))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        of_base = _logprobs(plain(torch.tensor([ids])).logits[0], ids)
        of_peft = _logprobs(PeftModel.from_pretrained(plain, str(adapter))(torch.tensor([ids])).logits[0], ids)
    assert (of_peft - of_base).abs().max() > 0.1
    for model, lora in ((base, str(adapter)), (merged, "")):
        run = [sys.executable, "-c", WITH_VLLM, str(model), lora, json.dumps(ids)]
        own = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        done = subprocess.run(run, env=os.environ | own, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr[-3000:]
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), of_peft, rtol=0, atol=1e-4)


def _logprobs(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.slow
def test_sglang_reads_the_adapter(tmp_path):
    pytest.importorskip("sglang.srt.lora.lora", reason="SGLang is not installed")
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.backend.base_backend import BaseLoRABackend
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    base = make_random_model(tmp_path / "base")
    adapter, merged = export(base, tmp_path)
    read = LoRAConfig(str(adapter))
    backend = BaseLoRABackend.__new__(BaseLoRABackend)  # only named while weights are read
    backend.name = "torch"
    lora = LoRAAdapter("student", read, AutoConfig.from_pretrained(base), LoadConfig(), backend)
    lora.initialize_weights_from_tensors(load_file(adapter / "adapter_model.safetensors"))
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    stacked = {part: _stacked(lora.layers[0].weights, f"qkv_proj.lora_{part}") for part in "AB"}
    start = 0
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):  # SGLang stacks the three
        key = f"model.layers.0.self_attn.{name}.weight"
        end = start + before[key].shape[0]
        change = lora.scaling * stacked["B"][start:end] @ stacked["A"][number * read.r : (number + 1) * read.r]
        torch.testing.assert_close(change, after[key] - before[key], rtol=0, atol=1e-6)
        start = end


def _stacked(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    (found,) = (tensor for key, tensor in weights.items() if name in key)
    return found


@pytest.mark.slow
def test_llama_cpp_converts_and_runs_adapter_and_merged_model(tmp_path):
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("set LLAMA_CPP to a checkout of llama.cpp")
    for package in ("gguf", "sentencepiece", "llama_cpp"):
        pytest.importorskip(package)
    scripts = Path(os.environ["LLAMA_CPP"])
    base = _qwen3_with_a_tokenizer_that_converters_know(scripts, tmp_path / "base")
    adapter, merged = export(base, tmp_path)
    convert = [sys.executable, str(scripts / "convert_hf_to_gguf.py"), "--outtype", "f32", "--outfile"]
    for folder in (base, merged):
        subprocess.run([*convert, f"{folder}.gguf", str(folder)], check=True, timeout=300)
    convert = [sys.executable, str(scripts / "convert_lora_to_gguf.py"), "--outtype", "f32", "--base", str(base)]
    subprocess.run([*convert, "--outfile", f"{adapter}.gguf", str(adapter)], check=True, timeout=300)

    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        of_base = plain(torch.tensor([ids])).logits[0]
        of_peft = PeftModel.from_pretrained(plain, str(adapter))(torch.tensor([ids])).logits[0]
    assert (of_peft - of_base).abs().max() > 0.1
    torch.testing.assert_close(_logits_of_llama_cpp(f"{base}.gguf", ids), of_base, rtol=0, atol=1e-2)
    torch.testing.assert_close(_logits_of_llama_cpp(f"{merged}.gguf", ids), of_peft, rtol=0, atol=1e-2)
    found = _logits_of_llama_cpp(f"{base}.gguf", ids, lora_path=f"{adapter}.gguf")
    torch.testing.assert_close(found, of_peft, rtol=0, atol=1e-2)


def _qwen3_with_a_tokenizer_that_converters_know(llama_cpp: Path, folder: Path) -> Path:
    """Write a tiny random Qwen3 with the vocabulary of Qwen2, of which llama.cpp keeps a copy for its tests."""
    tokenizer = AutoTokenizer.from_pretrained(llama_cpp / "models", gguf_file="ggml-vocab-qwen2.gguf")
    tokenizer.eos_token = "<|im_end|>"
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = SHAPE | HEAD_DIM["qwen3"] | special
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", vocab_size=len(tokenizer), **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _logits_of_llama_cpp(path: str, ids: list[int], **options: str) -> torch.Tensor:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=128, n_threads=1, logits_all=True, verbose=False, **options)
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])
