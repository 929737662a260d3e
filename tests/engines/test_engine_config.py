"""Engine settings that cannot work are refused before anything is loaded; none of it needs vLLM."""

import signal

import pytest

from pmd.cli import main
from pmd.config.check import check_config
from pmd.config.load import load_config
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
    ],
)  # fmt: skip
def test_settings_that_cannot_run_are_refused(overrides, message):
    with pytest.raises(ConfigError) as refused:
        check_config(load_config(["configs/tiny.yaml"], overrides))
    assert message in str(refused.value)


@pytest.fixture
def sigterm():
    """Restore the handler of SIGTERM, which `fit` sets."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize(
    ("version", "said"), [("0.25.1", "needs vLLM >=0.26; vllm 0.25.1 is installed"), ("0.34.0", "known: below 0.34")]
)
def test_an_old_version_of_vllm_is_refused_and_a_new_one_is_warned_of(tmp_path, monkeypatch, capsys, version, said):
    """An empty package with that name and version comes first on the path; it cannot start."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / f"vllm-{version}.dist-info").mkdir()
    (tmp_path / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "fit", "--config", "configs/tiny.yaml", "--rollouts.engine=vllm", f"--run_dir={tmp_path / 'run'}",
        "--rollouts.vllm.kv_cache_memory_bytes=33554432",
    ]  # fmt: skip
    assert main(arguments) == (2 if version == "0.25.1" else 1)
    printed = capsys.readouterr()
    assert said in printed.err + printed.out
    assert ("did not start" in printed.err) == (version == "0.34.0")
