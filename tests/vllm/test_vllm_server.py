"""The server engine on a real server: killed in the middle of a batch, restarted, nothing lost."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from command_line import ROOT, run_pmd
from questions import make_questions
from vllm_checkpoints import disturb, make_random_policy
from vllm_runs import metrics

from pmd.config.schema import (
    BehaviourWriterConfig,
    ModelConfig,
    ReflectionConfig,
    RunConfig,
    ServerConfig,
    VLLMConfig,
)
from pmd.engines.base import Request, Sampling
from pmd.engines.parity import ParityCheck
from pmd.engines.server import VLLMServerEngine
from pmd.engines.server_client import ServerClient
from pmd.errors import EngineError
from pmd.memory.behaviour_writer import BehaviourWriter
from pmd.pretrained import load_tokenizer
from pmd.tasks.prompts import make_prompts

pytestmark = pytest.mark.vllm
REQUESTS = [Request(tuple(range(1, 40 + number)), number) for number in range(24)]
SAMPLING = Sampling(1.0, 64)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """A supervised server: its address and its supervisor process."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log.txt"
    command = [
        sys.executable, "-m", "pmd", "serve", "--port", str(port), "--config", "configs/qwen3_8b.yaml",
        "--config", "configs/overlays/cpu_vllm.yaml", f"--model.path={checkpoint}",
    ]  # fmt: skip
    with log.open("w") as out:
        supervisor = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    yield f"http://127.0.0.1:{port}", supervisor
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=60) == 0, log.read_text()[-3000:]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_until_healthy(server: ServerClient) -> None:
    deadline = time.monotonic() + 400
    while not server.is_healthy():
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.5)


def test_a_server_killed_in_the_middle_of_a_batch(served, checkpoint, tmp_path):
    url, supervisor = served
    config = ServerConfig(urls=[url], concurrency=8, recovery_s=400.0, backoff_s=0.2, retries=3)
    engine = VLLMServerEngine(*make_random_policy(checkpoint, "lora"), config, tmp_path)
    wait_until_healthy(engine.servers[0])
    engine.sync(1)
    undisturbed = dict(engine.generate(REQUESTS, SAMPLING))
    assert sorted(undisturbed) == list(range(len(REQUESTS)))

    arrivals, positions = engine.generate(REQUESTS, SAMPLING), []
    positions.append(next(arrivals))
    server = child_of(supervisor.pid)
    os.kill(server, signal.SIGKILL)
    positions += list(arrivals)
    assert child_of(supervisor.pid) != server
    assert sorted(position for position, _ in positions) == list(range(len(REQUESTS)))
    assert {p: c.token_ids for p, c in positions} == {p: c.token_ids for p, c in undisturbed.items()}

    check = ParityCheck(
        engine, engine.policy, [r.prompt_ids for r in REQUESTS[:2]], VLLMConfig(parity_bound=1e-4),
        engine.tokenizer.pad_token_id,
    )  # fmt: skip
    for version in range(2, 5):
        disturb(engine.policy, 0.3, seed=version)
        engine.sync(version)
        assert check.measure(nullcontext())["parity/max"] <= 1e-4
    disturb(engine.policy, 0.3, seed=9)
    with pytest.raises(EngineError, match="earlier version"):
        check.measure(nullcontext())
    engine.close()
    assert engine.servers[0].models() == ["base"]


def test_two_epochs_with_prefetch(served, checkpoint, tmp_path):
    wait_until_healthy(ServerClient(served[0], 60.0))
    run_dir = tmp_path / "run"
    run_pmd(
        "fit", "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml",
        f"--model.path={checkpoint}", f"--data.path={make_questions(tmp_path, 24)}", f"--run_dir={run_dir}",
        "--rollouts.engine=vllm_server", f"--rollouts.server.urls=[{served[0]}]", "--rollouts.prefetch=true",
    )  # fmt: skip
    assert max(metrics(run_dir, "parity/max")) <= 1e-4
    assert metrics(run_dir, "rollout/versions_behind") == [0, 1, 0, 1]


def test_a_served_model_writes_behaviours(served, checkpoint):
    """vLLM's chat endpoint is called and answers; a random model's answer is no behaviour, which is counted."""
    wait_until_healthy(ServerClient(served[0], 60.0))
    endpoint = BehaviourWriterConfig(f"{served[0]}/v1", "base", max_calls_per_step=1, timeout_s=60.0)
    run = RunConfig(model=ModelConfig(str(checkpoint), prompts="chat"))
    prompts = make_prompts(run, load_tokenizer(run.model))
    writer = BehaviourWriter(ReflectionConfig(max_new_tokens=16, behaviour_writer=endpoint), prompts)
    clusters = [["Check the units first.", "Compare the units."], ["Count the atoms."]]
    written = writer.write(clusters, 1)
    writer.close()
    assert (written.num_calls, written.num_failed, written.num_deferred) == (1, 0, 1), written.problem
    assert 0 < written.num_tokens <= 16
    assert written.num_malformed == written.texts[:1].count(None)


def test_the_command_serves_the_configuration(checkpoint):
    shown = run_pmd(
        "serve", "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml",
        f"--model.path={checkpoint}", "--port=8765", "--tensor-parallel-size=2", "--data-parallel-size=4", "--dry-run",
    ).stdout  # fmt: skip
    command = shlex.split(shown)
    for flag, value in {
        "--model": str(checkpoint), "--port": "8765", "--max-loras": "1", "--dtype": "float32",
        "--tensor-parallel-size": "2", "--data-parallel-size": "4",
    }.items():  # fmt: skip
        assert command[command.index(flag) + 1] == value
    assert "--enable-lora" in command
    assert "--gpu-memory-utilization" not in command
