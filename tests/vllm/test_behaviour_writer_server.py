"""Behaviours from a real OpenAI-compatible server: vLLM's own, with the shipped model that knows the form."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from command_line import ROOT

from pmd.config.schema import BehaviourWriterConfig, ModelConfig, ReflectionConfig
from pmd.engines.server_client import BASE_MODEL, ServerClient
from pmd.memory.behaviour_writer import BehaviourWriter
from pmd.pretrained import load_tokenizer
from pmd.tasks.prompts.chat import ChatPrompts

pytestmark = pytest.mark.vllm
CLUSTERS = [["Read twice: slowly.", "Draw it: neatly."], ["Count atoms: each one.", "Check units: at the end."]]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "pmd", "serve", "--port", str(port), "--config", "configs/qwen3_8b.yaml",
        "--config", "configs/overlays/cpu_vllm.yaml", "--model.path=tiny_exam",
    ]  # fmt: skip
    with log.open("w") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        supervisor = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)
    server, deadline = ServerClient(f"http://127.0.0.1:{port}", 60.0), time.monotonic() + 500
    try:
        while not server.is_healthy():
            assert supervisor.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"{server.url}/v1"
    finally:
        supervisor.send_signal(signal.SIGTERM)
        code = supervisor.wait(timeout=60)
    assert code == 0, log.read_text()[-3000:]


def written(url: str, model: str):
    endpoint = BehaviourWriterConfig(url, model, max_calls_per_step=4, timeout_s=120)
    config = ReflectionConfig(max_new_tokens=160, behaviour_writer=endpoint)
    writer = BehaviourWriter(config, ChatPrompts(load_tokenizer(ModelConfig(path="tiny_exam"))))
    found = writer.write(CLUSTERS, 1)
    writer.close()
    return found


def test_a_real_server_writes_behaviours(url):
    found = written(url, BASE_MODEL)
    assert (found.num_calls, found.num_failed, found.num_malformed) == (2, 0, 0), found.problem
    assert all(text and ": " in text for text in found.texts)


def test_a_model_that_it_does_not_serve_is_counted(url):
    found = written(url, "nobody")
    assert (found.num_failed, found.texts) == (2, [None, None])
    assert "status 404" in found.describe_problem()
