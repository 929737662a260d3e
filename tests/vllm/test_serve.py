"""`pmd serve`: what cannot be served is said at once, without vLLM; the command that it would run."""

import shlex
import socket
from importlib.util import find_spec

import pytest
from command_line import run_pmd

FOUND = find_spec("vllm")  # without an origin it is this folder
IS_INSTALLED = FOUND is not None and FOUND.origin is not None
QWEN = ["serve", "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prot=8001"], "--prot is not an option of serve; did you mean --port?"),
        (["--port=99999"], "--port=99999 is not a port; give one from 1 to 65535"),
        (["--tensor-parallel-size=0"], "--tensor-parallel-size=0 must be at least 1"),
        (["--host=no.such.host.invalid"], "--host=no.such.host.invalid --port=8000 cannot be listened at"),
        (["--rollouts.vllm.max_num_seq=3", "--dry-run"], "max_num_seqs"),
    ],
)
def test_odd_options_are_refused_at_once(arguments, words):
    done = run_pmd(*QWEN, *arguments, code=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_pmd(*QWEN, f"--port={port}", code=2)
    assert f"--port={port} cannot be listened at" in done.stderr
    assert "rollouts.server.urls" in done.stderr


def test_help_names_every_option():
    shown = run_pmd("serve", "--help").stdout
    for option in ("--config", "--host", "--port", "--tensor-parallel-size", "--data-parallel-size", "--dry-run"):
        assert option in shown


@pytest.mark.skipif(IS_INSTALLED, reason="vLLM is installed")
@pytest.mark.parametrize("command", ["serve", "fit"])
def test_without_vllm_the_remedy_is_said(command):
    done = run_pmd(command, *QWEN[1:], "--rollouts.engine=vllm", code=2)
    assert "rollouts.engine=vllm needs vLLM; pip install 'pmd[gpu]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.vllm
def test_the_command_serves_the_configuration(checkpoint):
    command = shlex.split(run_pmd(*QWEN, f"--model.path={checkpoint}", "--port=8765", "--dry-run").stdout)
    for flag, value in (("--model", str(checkpoint)), ("--port", "8765"), ("--max-loras", "1"), ("--dtype", "float32")):
        assert command[command.index(flag) + 1] == value
    assert "--enable-lora" in command
    assert "--gpu-memory-utilization" not in command
