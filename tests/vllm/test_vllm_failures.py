"""The real vLLM short of memory, stalled, hung, dead: completions arrive complete, or an error names the cause."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alone import REQUESTS, generate
from command_line import run_pmd
from questions import make_questions

pytestmark = pytest.mark.vllm


def alone(checkpoint: Path, case: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run one case of alone.py."""
    script = str(Path(__file__).with_name("alone.py"))
    done = subprocess.run(
        [sys.executable, script, str(checkpoint), case], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def test_preempted_requests_give_the_same_completions(runtime, checkpoint):
    answer = json.loads(alone(checkpoint, "preempted").stdout.splitlines()[-1])
    assert answer["preemptions"] > 0
    unconstrained = generate(runtime)
    assert sorted(map(int, answer["found"])) == sorted(unconstrained) == list(range(len(REQUESTS)))
    for position, (token_ids, logprobs, finish_reason) in answer["found"].items():
        expected = unconstrained[int(position)]
        assert (tuple(token_ids), finish_reason) == (expected.token_ids, expected.finish_reason)
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)


def test_a_stalled_engine_raises_an_error_and_can_continue_afterwards(checkpoint):
    error, count = alone(checkpoint, "paused").stdout.splitlines()[-2:]
    for words in ("stall_s=2 s", "request 0 (prompt of 60 tokens) is pending, the first of 32", "discarded"):
        assert words in error
    assert int(count) == len(REQUESTS)


def test_a_step_that_never_returns_ends_the_process(checkpoint):
    done = alone(checkpoint, "hung", code=1)
    for words in ("EngineError: vLLM produced no token", "request 0 (prompt of 60", "--ckpt_path last", "in generate"):
        assert words in done.stderr, words


def test_an_engine_that_fails_raises_an_error(checkpoint):
    error = alone(checkpoint, "died").stdout.splitlines()[-1]
    for words in ("failed with 30 completions pending", "CUDA out of memory", "lower rollouts.vllm.max_num_seqs"):
        assert words in error


def test_a_cache_too_small_for_one_sequence_is_refused_before_anything_starts(checkpoint, tmp_path):
    done = run_pmd(
        "fit", "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml",
        f"--model.path={checkpoint}", f"--data.path={make_questions(tmp_path, 24)}",
        f"--run_dir={tmp_path / 'run'}", "--rollouts.vllm.kv_cache_memory_bytes=1048576", code=2,
    )  # fmt: skip
    for words in ("kv_cache_memory_bytes=1048576 holds 2048 tokens", "set it to at least 4202496", "max_prompt_tokens"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "vLLM" not in done.stdout
