"""Engine settings that cannot work are refused before anything is loaded; none of it needs vLLM."""

import signal
from dataclasses import replace

import pytest

from pmd.cli import main
from pmd.config.check import check_config
from pmd.config.load import load_config
from pmd.engines.make import GpuShare, check_engine, engine_settings
from pmd.engines.vllm_runtime import process_environment
from pmd.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollouts.engine=vllm_server"], "model.finetune=full"),
        (["rollouts.engine=vllm_server", "model.finetune=lora", "rollouts.server.urls=[]"], "names no server"),
        (["rollouts.engine=vllm_server", "model.finetune=lora", "rollouts.server.urls=[host:1]"], "begin with http"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=['http://host:80a']"], "http://host:80a names no host"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=['https://']"], "https:// names no host and port"),
        (["rollouts.engine=vllm", "rollouts.vllm.quantization=fp8"], "quantization=fp8 with model.finetune=full"),
        (["rollouts.engine=vllm", "rollouts.vllm.quantization=bitsandbytes"], "needs vllm-bnb-plugin"),
        (["rollouts.engine=vllm", "rollouts.vllm.quantization=gptq"], "none, fp8, bitsandbytes"),
        (["rollouts.engine=vllm", "model.finetune=qlora"], "use bfloat16"),
        (["rollouts.engine=vllm", "rollouts.vllm.max_model_len=2000"], "max_model_len=2000 is below 16390"),
        (["rollouts.prefetch=true"], "prefetch=true"),
        (["trainer.strategy=fsdp2", "rollouts.engine=vllm", "rollouts.vllm.share_weights=true"], "has a part of it"),
        (["trainer.strategy=fsdp2", "model.finetune=qlora"], "4-bit weights are not divided among ranks; use lora"),
        (["trainer.strategy=fsdp2", "optimizer.kind=adamw_8bit_paged"], "bitsandbytes steps whole weights only"),
        (["trainer.strategy=fsdp2", "model.offload_activations=true"], "offload_activations=true with trainer.strat"),
        (["trainer.strategy=fsdp2", "rollouts.uniform_groups=resample", "memory.enabled=false"], "different numbers"),
    ],
)  # fmt: skip
def test_settings_that_cannot_run_are_refused(overrides, message):
    with pytest.raises(ConfigError) as refused:
        check_config(load_config(["configs/tiny.yaml"], overrides))
    assert message in str(refused.value)


def test_full_and_lora_runs_may_divide_their_weights():
    for finetune in ("full", "lora"):
        settings = [
            "trainer.strategy=fsdp2",
            "trainer.devices=2",
            f"model.finetune={finetune}",
            "memory.audit_groups=4",
        ]
        check_config(load_config(["configs/tiny.yaml"], settings))


@pytest.fixture
def sigterm():
    """Restore the handler of SIGTERM, which `fit` sets."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def install_empty_vllm(folder, monkeypatch, version):
    """Put an empty package with that name and version first on the path."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text("")
    (folder / f"vllm-{version}.dist-info").mkdir()
    (folder / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.usefixtures("sigterm")
def test_an_old_version_of_vllm_is_refused(tmp_path, monkeypatch, capsys):
    install_empty_vllm(tmp_path, monkeypatch, "0.25.1")
    arguments = [
        "fit", "--config", "configs/tiny.yaml", "--rollouts.engine=vllm", f"--run_dir={tmp_path / 'run'}",
        "--rollouts.vllm.kv_cache_memory_bytes=33554432",
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "needs vLLM >=0.26; vllm 0.25.1 is installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(("version", "warns"), [("0.26.0", False), ("0.33.2", False), ("0.34.0", True), ("1.0", True)])
def test_a_version_of_vllm_newer_than_any_that_was_tried_is_warned_of(tmp_path, monkeypatch, capsys, version, warns):
    install_empty_vllm(tmp_path, monkeypatch, version)
    check_engine(load_config(["configs/tiny.yaml"], ["rollouts.engine=vllm"]).run)
    said = capsys.readouterr().out
    assert (f"vLLM {version} has not been tried with pmd (known: below 0.34)" in said) == warns
    assert bool(said) == warns


def test_the_environment_keeps_flashinfer_off_where_it_is_missing_and_compiled_code_in_the_run(tmp_path):
    vllm = load_config(["configs/tiny.yaml"], ["rollouts.engine=vllm", "model.finetune=lora"]).run
    settings = engine_settings(vllm, 4096, GpuShare(None, shares_weights=True, sleeps=False), tmp_path / "cache")
    environment = process_environment(settings)
    assert environment["VLLM_CACHE_ROOT"] == str(tmp_path / "cache")
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"  # the package is not installed here
    assert (settings.shares_weights, settings.request_seeds, settings.num_adapters) == (True, True, 1)
    assert "VLLM_CACHE_ROOT" not in process_environment(replace(settings, cache_dir=None))
