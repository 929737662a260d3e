"""What `pmd doctor` predicts and `pmd bench` reports for a GPU, against what torch allocated there."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pmd.cli import main
from pmd.config.schema import ModelConfig, ObjectiveConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.module import PMDModule
from pmd.planning.bench import measure_steps
from pmd.planning.gpu_memory import predict, read_shape
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples
from pmd.pretrained import resolve_model_path

ROWS, LENGTHS = 4, Lengths(512, 512, 256, 256)
CUDA_LIBRARIES_BYTES = 64e6  # workspaces of cuBLAS and the like, which no layer asks for


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1600, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model_path("tiny")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_memory_is_within_20_percent(model_path, finetune, dtype, checkpointing):
    model = ModelConfig(model_path, dtype, finetune, lora_rank=8, gradient_checkpointing=checkpointing)
    run = RunConfig(
        model=model, objective=ObjectiveConfig(alpha=0.5, top_k=20), teacher=TeacherConfig(kind="ema"),
        rollouts=RolloutsConfig(share_prefixes="off", engine="vllm"),
    )  # fmt: skip
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    batches = FixedBatches(synthetic_examples(2, ROWS // 2, LENGTHS, 100), 2)
    measured = measure_steps(PMDModule(run), batches, 2, "gpu").peak_memory_bytes - before
    predicted = sum(predict(read_shape(model), run, ROWS * 768, ROWS * 256, "cuda").values())
    assert abs(predicted - measured) <= 0.2 * measured + CUDA_LIBRARIES_BYTES, (predicted, measured)


def test_bench_reports_the_gpu(tmp_path, model_path):
    out = tmp_path / "bench.json"
    arguments = [
        "bench", "--config", "configs/tiny.yaml", f"--model.path={model_path}", "--steps=2", "--prompt-tokens=64",
        "--trainer.accelerator=gpu", f"--json={out}",
    ]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["device"] == torch.cuda.get_device_name()
    assert 0 < result["peak_memory_gb"] <= result["reserved_memory_gb"]
    assert result["tflops_per_s"] > 0
    if "H100" in result["device"] or "H200" in result["device"]:
        assert 0 < result["mfu"] < 1
