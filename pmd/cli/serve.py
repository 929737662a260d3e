"""`python -m pmd serve --config FILE`: runs a vLLM server for training, and restarts it whenever it dies.

The trainer loads its adapters into the server. Anyone who can reach the server can make it load files, so it listens
only on this machine unless --host is given.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from pmd.cli.arguments import load_checked, make_config_parser, split_options
from pmd.errors import EngineError

DESCRIPTION = """Serve a configuration's model with vLLM, for runs with rollouts.engine=vllm_server.

  python -m pmd serve --config configs/qwen3_8b.yaml
  python -m pmd fit --config configs/qwen3_8b.yaml --rollouts.engine=vllm_server

The server has the settings that the configuration needs, and is restarted when it dies. Anyone who can reach it can
make it load files, so it listens only on this machine unless --host is given."""
ONE_PROCESS = ("trainer.strategy=auto", "trainer.devices=1", "trainer.num_nodes=1")  # however many of them train
MAX_RESTARTS = 5  # in a row, each after less than SETTLED_S seconds
SETTLED_S = 600.0  # a server that ran for longer had started properly
FIRST_PAUSE_S = 1.0


def main(argv: list[str]) -> int:
    """Serve until SIGINT or SIGTERM; return 0."""
    arguments, rest = split_options(_parser(), argv, _option_problems)
    loaded = load_checked("serve", rest, ["rollouts.engine=vllm", *ONE_PROCESS])

    from pmd.engines.make import GpuShare, engine_settings
    from pmd.engines.vllm_runtime import check_version, server_command, server_environment
    from pmd.planning.engine_memory import read_cache, refuse_small_cache
    from pmd.pretrained import load_model_config

    check_version()
    refuse_small_cache(read_cache(loaded.run), loaded.run)
    model = load_model_config(loaded.run.model).get_text_config()
    # The server is assumed to have a GPU of its own; without memory_fraction vLLM takes its usual share.
    alone = GpuShare(loaded.run.rollouts.vllm.memory_fraction, shares_weights=False, sleeps=False)
    settings = engine_settings(loaded.run, model.max_position_embeddings, alone)
    sizes = {
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "data_parallel_size": arguments.data_parallel_size,
    }
    parallel = {name: size for name, size in sizes.items() if size > 1}
    command = server_command(settings, arguments.host, arguments.port, parallel)
    print(shlex.join(command), flush=True)
    return 0 if arguments.dry_run else Supervisor(command, server_environment(settings)).run()


def _parser() -> argparse.ArgumentParser:
    parser = make_config_parser("serve", DESCRIPTION)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (default: 1)")
    parser.add_argument("--data-parallel-size", type=int, default=1, help="copies of the model (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print vLLM's command and stop")
    return parser


def _option_problems(arguments: argparse.Namespace) -> list[str]:
    """Return the options that cannot work, so that vLLM is not started and restarted in vain."""
    problems = [
        f"--{name.replace('_', '-')}={value} must be at least 1."
        for name, value in vars(arguments).items()
        if name.endswith("_size") and value < 1
    ]
    if not 1 <= arguments.port <= 65535:
        return [*problems, f"--port={arguments.port} is not a port; give one from 1 to 65535, e.g. 8000."]
    if arguments.dry_run:
        return problems
    try:
        family, kind, _, _, address = socket.getaddrinfo(arguments.host, arguments.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        problems.append(
            f"--host={arguments.host} --port={arguments.port} cannot be listened at ({error.strerror}): end "
            "what listens there, or give another port, here and in rollouts.server.urls."
        )
    return problems


class Supervisor:
    """Keeps one server process running."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.command, self.environment = list(command), environment
        self.process: subprocess.Popen | None = None
        self.stopping = False

    def run(self) -> int:
        """Start the server, and restart it whenever it dies, after pauses that double each time.

        Raises:
            EngineError: it died too often in a row.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        failures = 0
        while not self.stopping:
            started = time.monotonic()
            self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
            code = self.process.wait()
            self._kill_group()
            if self.stopping:
                break
            failures = 1 if time.monotonic() - started > SETTLED_S else failures + 1
            if failures > MAX_RESTARTS:
                raise EngineError(f"the server ended {failures} times in a row, at last with code {code}; see its log.")
            pause_s = FIRST_PAUSE_S * 2 ** (failures - 1)
            print(
                f"the server ended with code {code}; restart {failures} of {MAX_RESTARTS} in {pause_s:.0f} s",
                flush=True,
            )
            time.sleep(pause_s)
        return 0

    def _end(self, *_: object) -> None:
        self.stopping = True
        if self.process is not None:
            self.process.terminate()

    def _kill_group(self) -> None:
        """Kill the processes that the server left behind: its engine may still hold the GPU."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
