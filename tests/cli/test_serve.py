"""`pmd serve` without vLLM: what cannot be served is refused at once, and no server outlives its supervisor."""

import os
import signal
import socket
import sys
from importlib.util import find_spec

import pytest

from pmd.cli import main
from pmd.cli.serve import Supervisor

FOUND = find_spec("vllm")  # a folder of tests named vllm is found, too, but has no origin
IS_INSTALLED = FOUND is not None and FOUND.origin is not None
QWEN = ["serve", "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot=8001"], "--prot is not an option of serve; did you mean --port?"),
        (["--port=99999"], "--port=99999 is not a port; give one from 1 to 65535"),
        (["--tensor-parallel-size=0"], "--tensor-parallel-size=0 must be at least 1"),
        (["--host=no.such.host.invalid"], "--host=no.such.host.invalid --port=8000 cannot be listened at"),
        (["--rollouts.vllm.max_num_seq=3", "--dry-run"], "max_num_seqs"),
    ],
)
def test_invalid_options_are_refused(arguments, message, capsys):
    assert main([*QWEN, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*QWEN, f"--port={port}"]) == 2
    error = capsys.readouterr().err
    assert f"--port={port} cannot be listened at" in error
    assert "rollouts.server.urls" in error


def test_help_lists_every_option(capsys):
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--config", "--host", "--port", "--tensor-parallel-size", "--data-parallel-size", "--dry-run"):
        assert option in shown


@pytest.mark.skipif(IS_INSTALLED, reason="vLLM is installed")
@pytest.mark.parametrize("command", ["serve", "fit"])
def test_the_error_without_vllm_names_the_remedy(command, capsys):
    assert main([command, *QWEN[1:], "--rollouts.engine=vllm"]) == 2
    assert "rollouts.engine=vllm needs vLLM; pip install 'pmd[gpu]'" in capsys.readouterr().err


def test_a_server_ends_with_its_supervisor_and_leaves_no_process(tmp_path):
    os.mkfifo(tmp_path / "held")
    engine = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"with open({str(tmp_path / 'held')!r}, 'w') as held: print('started', file=held, flush=True); time.sleep(3600)"
    )
    server = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {engine!r}]); time.sleep(600)"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = Supervisor([sys.executable, "-c", server], dict(os.environ)).run()
        finally:
            os._exit(code)
    with (tmp_path / "held").open() as held:
        assert held.readline() == "started\n"
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert held.read() == ""  # every process that held it has ended
