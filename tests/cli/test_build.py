"""What happens in which order before a run's first step."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from pmd.cli import main
from pmd.cli import run as run_module

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
