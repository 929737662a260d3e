"""Two real servers: requests are shared, each gets an adapter once, and one takes over what the other had."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT
from test_vllm_server import REQUESTS, SAMPLING, child_of, free_port
from vllm_checkpoints import disturb, make_random_policy

from pmd.config.schema import ServerConfig
from pmd.engines.server import VLLMServerEngine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3000)]
START_S = 2400.0  # on a busy machine; a minute is usual


class Served:
    """`pmd serve` on a port of this machine."""

    def __init__(self, checkpoint: Path, log: Path):
        self.port, self.log = free_port(), log
        command = [
            sys.executable, "-m", "pmd", "serve", "--port", str(self.port), "--config", "configs/qwen3_8b.yaml",
            "--config", "configs/overlays/cpu_vllm.yaml", f"--model.path={checkpoint}",
        ]  # fmt: skip
        with log.open("w") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.supervisor = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, path: str) -> int:
        """Return how many requests for a path the server has answered well."""
        return self.log.read_text().count(f'POST {path} HTTP/1.1" 200')

    def kill(self) -> None:
        """Kill the supervisor, so that it restarts nothing, and the server with all its processes."""
        server = child_of(self.supervisor.pid)
        self.supervisor.kill()
        os.killpg(server, signal.SIGKILL)
        self.supervisor.wait()


@pytest.fixture
def two_servers(checkpoint, tmp_path):
    servers = [Served(checkpoint, tmp_path / f"server-{number}.log") for number in range(2)]
    yield servers
    for server in servers:
        server.supervisor.send_signal(signal.SIGTERM)
        server.supervisor.wait(timeout=120)


def test_two_servers_share_the_work_and_one_takes_over(two_servers, checkpoint, tmp_path):
    dying, other = two_servers
    config = ServerConfig(urls=[s.url for s in two_servers], concurrency=4, recovery_s=60.0, backoff_s=0.2, retries=3)
    engine = VLLMServerEngine(*make_random_policy(checkpoint, "lora"), config, tmp_path / "adapters")
    deadline = time.monotonic() + START_S
    while not all(client.is_healthy() for client in engine.servers):
        assert time.monotonic() < deadline, dying.log.read_text()[-3000:]
        time.sleep(0.5)
    for client in engine.servers:
        client.down_since = None

    engine.sync(1)
    undisturbed = dict(engine.generate(REQUESTS, SAMPLING))
    shares = [server.count("/v1/completions") for server in two_servers]
    print(f"completions of each server: {shares}")
    assert sum(shares) == len(REQUESTS)
    assert min(shares) >= len(REQUESTS) // 4
    assert [server.count("/v1/load_lora_adapter") for server in two_servers] == [1, 1]

    arrivals = engine.generate(REQUESTS, SAMPLING)
    arrived = [next(arrivals)]
    dying.kill()
    arrived += arrivals
    assert sorted(position for position, _ in arrived) == list(range(len(REQUESTS)))
    assert {p: c.token_ids for p, c in arrived} == {p: c.token_ids for p, c in undisturbed.items()}
    assert other.count("/v1/completions") - shares[1] > len(REQUESTS) // 2

    disturb(engine.policy, 0.3, seed=1)
    engine.sync(2)
    changed = dict(engine.generate(REQUESTS, SAMPLING))
    assert sorted(changed) == list(range(len(REQUESTS)))
    assert {p: c.token_ids for p, c in changed.items()} != {p: c.token_ids for p, c in undisturbed.items()}
    assert other.count("/v1/load_lora_adapter") == 2
    engine.close()
