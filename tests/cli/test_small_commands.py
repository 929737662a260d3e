"""`init` writes what `check` accepts, `completion` completes, `generate` prompts a checkpoint as the student is."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pmd.cli import COMMANDS, main
from pmd.config.load import load_config
from pmd.module import PMDModule


def test_init_writes_what_can_start(tmp_path, capsys):
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "my own.yaml"
    options = [
        "--model",
        "tiny_exam",
        "--data",
        str(tmp_path / "tasks.jsonl"),
        "--verifier",
        "exact",
        "--out",
        str(out),
    ]
    assert main(["init", *options]) == 0
    assert f"next: python -m pmd check --config '{out}'" in capsys.readouterr().out
    assert main(["check", "--config", str(out), f"--run_dir={tmp_path / 'run'}"]) == 0
    assert "17 train tasks" in capsys.readouterr().out
    assert main(["init", *options]) == 2
    assert "exists" in capsys.readouterr().err


def test_init_fits_the_model_to_the_gpu(tmp_path, capsys):
    (tmp_path / "big").mkdir()
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
    (tmp_path / "big" / "config.json").write_text(json.dumps({"model_type": "qwen3"} | shape))
    for gpu_gb, finetune in ((80, "lora"), (24, "qlora")):
        out = tmp_path / f"{finetune}.yaml"
        options = ["--model", str(tmp_path / "big"), "--data", "org/set", "--gpu-gb", str(gpu_gb), "--out", str(out)]
        assert main(["init", *options]) == 0
        loaded = load_config([out])
        assert (loaded.problems, loaded.run.model.finetune, loaded.run.rollouts.engine) == ([], finetune, "vllm")
    small = ["--model", str(tmp_path / "big"), "--data", "d", "--gpu-gb", "4", "--out", str(tmp_path / "none.yaml")]
    assert main(["init", *small]) == 2
    assert "even in 4 bits" in capsys.readouterr().err
    assert not (tmp_path / "none.yaml").exists()


def completions_of(script: str, *words: str) -> list[str]:
    """What bash offers after these words."""
    typed = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}"
    line = f"{script}\n{typed}; _pmd 2>/dev/null; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_and_keys(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completions_of(script, "pmd", "comp") == ["compare", "completion"]
    assert set(COMMANDS) <= set(completions_of(script, "pmd", ""))
    assert completions_of(script, "pmd", "fit", "--optimizer.lr") == ["--optimizer.lr="]
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")


def test_a_checkpoint_can_be_prompted(full_run, capsys):
    prompt = ["--prompt", "task red 3 blue 5 green 1 gold 7 plan teb"]
    assert main(["generate", str(full_run), *prompt, "--samples", "2", "--temperature", "0"]) == 0
    first, second = capsys.readouterr().out.split("---\n")
    assert first == second
    assert ">" in first.split()[0]
    assert main(["generate", str(full_run), *prompt, "--samples", "0", "--max-new-tokens", "0"]) == 2
    assert "2 problems" in capsys.readouterr().err


@pytest.mark.parametrize(("accelerator", "device"), [("gpu", "cuda"), ("cpu", "cpu")])
def test_a_checkpoint_is_prompted_on_the_device_that_trained_it(full_run, tmp_path, monkeypatch, accelerator, device):
    """Weights load on the CPU, where the kernels that `model.layer_kernels` chooses for a GPU do not run."""
    run = Path(shutil.copytree(full_run, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("accelerator: cpu", f"accelerator: {accelerator}"))
    asked = []

    def note(module, to):
        asked.append(to)
        return module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(PMDModule, "to", note)
    assert main(["generate", str(run), "--prompt", "task red 3 blue 5 green 1 gold 7 plan teb"]) == 0
    assert asked == [device]


def test_a_run_leaves_tables_of_its_completions(full_run):
    steps = sorted((full_run / "completions").glob("step-*.jsonl"))
    assert [path.name for path in steps] == ["step-000000.jsonl", "step-000001.jsonl"]
    rows = [json.loads(line) for line in steps[0].read_text().splitlines()]
    assert len(rows) == 6 * 2
    for row in rows:
        assert "plan" in row["prompt"]
        assert row["status"] in ("ok", "wrong_answer", "format")
        assert row["mean_divergence"] >= 0
    evaluated = {path.stem for path in (full_run / "completions").glob("*.jsonl")} - {path.stem for path in steps}
    assert evaluated == {"test-initial", "test-last", "validation-000000", "validation-000002"}
    last = [json.loads(line) for line in (full_run / "completions" / "validation-000002.jsonl").open()]
    assert [row["memory_in_prompt"] for row in last] == [False] * 24 + [True] * 24  # 2 x 6 tasks, 2 samples of each
