"""`python -m pmd serve --config FILE`: a vLLM server with the flags that a run's configuration needs.

Enters: a configuration. Leaves: a server that is started again when it dies, until it is told to end. The trainer loads
its adapters into it. It listens on this machine alone unless --host says otherwise: whoever reaches it can load files.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from difflib import get_close_matches

from pmd.config.check import check_config
from pmd.config.load import load_arguments
from pmd.errors import ConfigError, EngineError

MAX_RESTARTS = 5  # in a row, each after less than SETTLED_S
SETTLED_S = 600.0
FIRST_PAUSE_S = 1.0


def main(argv: list[str]) -> int:
    """Serve until SIGINT or SIGTERM; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m pmd serve",
        usage="python -m pmd serve --config FILE [--config OVERLAY]... [--section.key=VALUE]... [options]",
        description="Serve a configuration's model with vLLM, given as to fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--data-parallel-size", type=int, default=1, help="copies of the model")
    parser.add_argument("--dry-run", action="store_true", help="print vLLM's command and end")
    arguments, rest = parser.parse_known_args(argv)
    problems = [*_option_problems(arguments), *_misspelt(parser, rest)]
    if problems:
        raise ConfigError(problems)
    loaded = load_arguments("serve", rest, ["rollouts.engine=vllm", "rollouts.vllm.sleep=false"])
    check_config(loaded)

    from transformers import AutoConfig

    from pmd.engines.make import engine_settings
    from pmd.engines.vllm_runtime import check_version, server_command, server_environment
    from pmd.planning.engine_memory import read_cache, refuse_small_cache
    from pmd.pretrained import resolve_model_path

    check_version()
    refuse_small_cache(read_cache(loaded.run), loaded.run)
    model = AutoConfig.from_pretrained(resolve_model_path(loaded.run.model.path)).get_text_config()
    # By default the server has a GPU of its own, and takes what vLLM takes of one.
    settings = engine_settings(loaded.run, model.max_position_embeddings, loaded.run.rollouts.vllm.memory_fraction)
    sizes = {
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "data_parallel_size": arguments.data_parallel_size,
    }
    parallel = {name: size for name, size in sizes.items() if size > 1}
    command = server_command(settings, arguments.host, arguments.port, parallel)
    print(shlex.join(command), flush=True)
    return 0 if arguments.dry_run else Supervisor(command, server_environment(settings)).run()


def _option_problems(arguments: argparse.Namespace) -> list[str]:
    """Say what the server could not be started with; found here, it costs no start of vLLM, and no five restarts."""
    problems = [
        f"--{name.replace('_', '-')}={value} must be at least 1."
        for name, value in vars(arguments).items()
        if name.endswith("_size") and value < 1
    ]
    if not 1 <= arguments.port <= 65535:
        return [*problems, f"--port={arguments.port} is no port; give one from 1 to 65535, e.g. 8000."]
    if arguments.dry_run:
        return problems
    try:
        family, kind, _, _, address = socket.getaddrinfo(arguments.host, arguments.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        problems.append(
            f"--host={arguments.host} --port={arguments.port} cannot be listened at ({error.strerror}): end what "
            "listens there, or give another port (and name it in rollouts.server.urls)."
        )
    return problems


def _misspelt(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[str]:
    """Name the options that look like one of the command's own; a configuration's keys have sections."""
    own = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    words = [word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word.partition("=")[0]]
    close = {word: get_close_matches(word, own, n=1) for word in words if word != "--config"}
    return [f"{word} is not an option of serve; did you mean {found[0]}?" for word, found in close.items() if found]


class Supervisor:
    """Keeps one server process alive."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.command, self.environment = list(command), environment
        self.process: subprocess.Popen | None = None
        self.told_to_end = False

    def run(self) -> int:
        """Start the server again whenever it dies, after ever longer pauses.

        Raises:
            EngineError: it died too often in a row.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        failures = 0
        while not self.told_to_end:
            started = time.monotonic()
            self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
            code = self.process.wait()
            self._kill_group()
            if self.told_to_end:
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
        self.told_to_end = True
        if self.process is not None:
            self.process.terminate()

    def _kill_group(self) -> None:
        """End what the server process left behind: its engine holds the GPU."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
