"""An export is evaluated by lm-evaluation-harness with the command of the page, on the task that it shows."""

import importlib.util
import re
import subprocess
import sys

import pytest
from command_line import ROOT, run_pmd

COMMAND = re.compile(r"^lm_eval (run .*)$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_command_of_the_page_evaluates_a_merged_adapter(tmp_path):
    run_dir, exported = tmp_path / "run", tmp_path / "exported"
    few = ["--data.max_train=8", "--data.max_validation=4", "--data.max_test=4", "--memory.enabled=false"]
    few += ["--teacher.context=none", "--objective.policy_gradient=1", "--objective.distillation=0"]
    lora = ["--model.finetune=lora", "--model.lora_rank=4", "--trainer.max_epochs=1", f"--run_dir={run_dir}"]
    run_pmd("fit", "--config", "configs/tiny_jsonl.yaml", *few, *lora)
    run_pmd("export", str(run_dir), "--out", str(exported), "--merge")
    (command,) = COMMAND.findall((ROOT / "docs" / "integrations.md").read_text().replace("\\\n", ""))
    words = command.replace("pretrained=exported-mine", f"pretrained={exported}").split()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            *words,
            "--limit",
            "2",
            "--log_samples",
            "--output_path",
            str(tmp_path / "out"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\|example_tasks\|.*\|answer\|.*\|exact_match\|", done.stdout.replace(" ", ""))
    (samples,) = (tmp_path / "out").rglob("samples_example_tasks_*.jsonl")
    assert len(samples.read_text().splitlines()) == 2
