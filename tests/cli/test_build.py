"""What happens in which order before a run's first step."""

from importlib.machinery import ModuleSpec

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from pmd.cli import main
from pmd.cli import run as run_module
from pmd.engines.make import GpuShare

TINY = ["--config", "configs/tiny.yaml", "--data.max_train=2", "--data.max_validation=2", "--data.max_test=2"]


class Seen(Exception):
    """Ends a run when the test has seen enough."""


@pytest.mark.parametrize(("command", "evaluates"), [("fit", "evaluate"), ("test", "_evaluate_split")])
def test_the_policy_is_on_the_trainers_device_when_it_is_first_evaluated(command, evaluates, tmp_path, monkeypatch):
    devices = set()

    def see(run, *_, **__):
        devices.update(parameter.device.type for parameter in run.module.parameters())
        raise Seen

    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("meta"))
    monkeypatch.setattr(run_module, evaluates, see)
    assert main([command, *TINY, f"--run_dir={tmp_path / 'run'}"]) == 1
    assert devices == {"meta"}


def test_an_embedder_that_cannot_be_loaded_is_refused_before_weights_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "PMDModule", lambda *_: pytest.fail("weights were loaded"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["fit", *TINY, f"--memory.embedder={empty}", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert f"memory.embedder={empty}" in capsys.readouterr().err


def test_the_gpu_is_divided_before_the_memorys_embedder_is_on_it(tmp_path, monkeypatch):
    """The embedder is one of the parts that are predicted, so what is free is measured without it."""
    order = []

    def note(name, result=None):
        return lambda *_: order.append(name) or result

    monkeypatch.setattr("pmd.config.check.find_spec", lambda name: ModuleSpec(name, None, origin=name))
    monkeypatch.setattr("pmd.cli.preflight.check_engine", lambda _: None)  # vLLM is not installed
    monkeypatch.setattr(run_module, "share_gpu", note("divided", (GpuShare(0.5, False, True), [])))
    monkeypatch.setattr(run_module, "ProceduralMemory", note("memory"))
    monkeypatch.setattr(run_module, "start_vllm", lambda *_: pytest.fail("the test has seen enough"))
    options = ["--rollouts.engine=vllm", "--rollouts.vllm.kv_cache_memory_bytes=67108864"]
    with pytest.raises(pytest.fail.Exception, match="seen enough"):
        main(["fit", *TINY, *options, f"--run_dir={tmp_path / 'run'}"])
    assert order == ["divided", "memory"]
