"""What vLLM must not get away with, and configurations that cannot work; none of it needs vLLM."""

import math

import pytest
from command_line import run_pmd
from transformers import AutoTokenizer

from pmd.config.check import check_config
from pmd.config.load import load_config
from pmd.engines.base import Sampling
from pmd.engines.vllm import to_completion
from pmd.engines.vllm_runtime import Generation
from pmd.errors import ConfigError, EngineError
from pmd.tiny import shipped_model_path

TOKENIZER = AutoTokenizer.from_pretrained(shipped_model_path("tiny_exam"))


def completed(token_ids, logprobs, finish_reason):
    generation = Generation(7, tuple(token_ids), tuple(logprobs), finish_reason)
    return to_completion(generation, Sampling(1.0, 4), TOKENIZER, (258,), policy_version=3)


def test_a_finished_completion_is_taken_as_it_is():
    hi = TOKENIZER.encode("Hi", add_special_tokens=False)
    completion = completed([*hi, 258], [-1.0, -2.0, -0.5], "stop")
    assert (completion.token_ids, completion.logprobs) == ((*hi, 258), (-1.0, -2.0, -0.5))
    assert (completion.text, completion.finish_reason, completion.policy_version) == ("Hi", "stop", 3)
    assert completed([72, 105, 72, 105], [-1.0] * 4, "length").finish_reason == "length"


@pytest.mark.parametrize(
    ("token_ids", "logprobs", "finish_reason", "named"),
    [
        ([], [], "stop", "0 tokens"),
        ([72, 258], [-1.0], "stop", "2 tokens and 1 log-probs"),
        ([72, 258], [-1.0, math.nan], "stop", "diverged"),
        ([72, 105], [-1.0, -1.0], "length", "cut at 2 of 4"),
    ],
)
def test_nothing_is_scored_that_was_not_generated_whole(token_ids, logprobs, finish_reason, named):
    with pytest.raises(EngineError, match=named):
        completed(token_ids, logprobs, finish_reason)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollouts.engine=vllm_server"], "model.finetune=full"),
        (["rollouts.engine=vllm_server", "model.finetune=lora", "rollouts.server.urls=[]"], "names no server"),
        (["rollouts.engine=vllm_server", "model.finetune=lora", "rollouts.server.urls=[host:1]"], "begin with http"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=['http://host:80a']"], "http://host:80a names no host"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=['https://']"], "https:// names no host and port"),
        (["rollouts.engine=vllm", "rollouts.vllm.quantization=fp8"], "quantization=fp8 with model.finetune=full"),
        (["rollouts.engine=vllm", "rollouts.vllm.quantization=bitsandbytes"], "needs vllm-bnb-plugin"),
        (["rollouts.engine=vllm", "rollouts.vllm.quantization=gptq"], "none, fp8, bitsandbytes"),
        (["rollouts.engine=vllm", "model.finetune=qlora"], "use bfloat16"),
        (["rollouts.engine=vllm", "rollouts.vllm.max_model_len=2000"], "max_model_len=2000 is below 16390"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_run_is_refused(overrides, named):
    with pytest.raises(ConfigError) as refused:
        check_config(load_config(["configs/tiny.yaml"], overrides))
    assert named in str(refused.value)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0"])
def test_an_untested_version_is_refused_with_the_range(tmp_path, version):
    """An empty package of that name and version comes first on the path."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / f"vllm-{version}.dist-info").mkdir()
    (tmp_path / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
    done = run_pmd(
        "fit", "--config", "configs/tiny.yaml", "--rollouts.engine=vllm", f"--run_dir={tmp_path / 'run'}",
        "--rollouts.vllm.kv_cache_memory_bytes=33554432", code=2, first_on_path=tmp_path,
    )  # fmt: skip
    assert f"needs vLLM >=0.32,<0.33; vllm {version} is installed" in done.stderr
    assert "Traceback" not in done.stderr
