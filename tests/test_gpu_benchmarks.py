"""benchmarks/gpu measures on machines without a network; without a GPU, only that it could be started is tested."""

import pytest
from questions import make_questions

from benchmarks.gpu import engine
from pmd.bootstrap.random_model import make_random_model
from pmd.cli import run as run_module
from pmd.run_dir import RunDir


class Started(Exception):
    """Ends the set-up where vLLM would start."""


def test_the_engine_is_measured_on_the_shipped_configuration_without_a_network(tmp_path, monkeypatch):
    """Everything that comes before vLLM's start happens; the Hub is not asked."""

    def start(config, *_):
        raise Started(config)

    for name in ("pmd.config.trainer", "pmd.config.check"):
        monkeypatch.setattr(f"{name}.cuda_is_available", lambda: True)
    monkeypatch.setattr("pmd.cli.preflight.check_engine", lambda _: None)  # vLLM is not installed
    monkeypatch.setattr(run_module, "_start_vllm", start)
    model, questions = make_random_model(tmp_path / "model"), make_questions(tmp_path, 16)
    loaded = engine.config_of("cuda", model, questions, 2, 16, 1)
    assert (loaded.run.rollouts.engine, loaded.run.model.dtype) == ("vllm", "bfloat16")
    with pytest.raises(Started):
        run_module.build(loaded.run, RunDir(tmp_path / "run"))
