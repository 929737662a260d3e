"""What other commands do with a run: resume it, export it, evaluate it without memory, and end it early."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import LORA, SMALL, run_pmd, small_fit, start_pmd
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmd.config.load import load_config
from pmd.config.save import resolved_yaml
from pmd.module import PMDModule
from pmd.run_dir import RunDir

PROMPT = "task red 7 blue 9 green 0 gold 5 plan teb"


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]


def student_of(run_dir: Path) -> PMDModule:
    module = PMDModule(load_config([run_dir / "config.yaml"]).run)
    module.load_state_dict(state_of(run_dir), strict=False)
    return module


def assert_same_model(module: PMDModule, exported: torch.nn.Module, folder: Path) -> None:
    """Compare logits and greedy completions of a run's student and of what was exported."""
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.equal(ids, module.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids)
    exported.eval()
    with torch.no_grad(), module.policy.weights("student") as student:
        student.eval()
        torch.testing.assert_close(exported(ids).logits, student(ids).logits)
        greedy = [m.generate(ids, do_sample=False, max_new_tokens=8).tolist() for m in (exported, student)]
    assert greedy[0] == greedy[1]


def test_lora_resumes_bit_for_bit(lora_run, tmp_path):
    run_dir = tmp_path / "run"
    small_fit(run_dir, 1, *LORA)
    small_fit(run_dir, 2, *LORA, "--ckpt_path=last")
    one, two = state_of(lora_run), state_of(run_dir)
    assert one.keys() == two.keys()
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_an_adapter_of_another_rank_is_refused(lora_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(lora_run, run_dir)
    done = small_fit(run_dir, 3, *LORA, "--model.lora_rank=8", "--ckpt_path=last", code=2)
    assert "model.lora_rank=8 (was 4) cannot change when a run is resumed" in done.stderr


def test_an_exported_adapter_is_the_student(lora_run, tmp_path):
    from peft import PeftModel

    out = tmp_path / "exported"
    run_pmd("export", str(lora_run), "--out", str(out))
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    described = json.loads((out / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(described["base_model_name_or_path"], dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, str(out))
    assert_same_model(student_of(lora_run), with_adapter, out)


def test_an_exported_checkpoint_is_the_student(full_run, tmp_path):
    out = tmp_path / "exported"
    run_pmd("export", str(full_run), "--out", str(out))
    assert_same_model(student_of(full_run), AutoModelForCausalLM.from_pretrained(out), out)
    said = run_pmd("export", str(full_run), "--out", str(out), code=2).stderr
    assert "not empty" in said


def test_an_export_needs_no_data_no_engine_and_no_gpu(lora_run, tmp_path):
    elsewhere = tmp_path / "run"
    shutil.copytree(lora_run, elsewhere)
    loaded = load_config(
        [elsewhere / "config.yaml"],
        ["trainer.accelerator=gpu", "rollouts.engine=vllm", "data.task=sciknoweval", "data.path=/nowhere"],
    )
    (elsewhere / "config.yaml").write_text(resolved_yaml(loaded))
    run_pmd("export", str(elsewhere), "--out", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("run", ["lora_run", "full_run"])
def test_evaluation_needs_no_memory_and_no_place(run, request, tmp_path):
    run_dir = tmp_path / "moved"
    shutil.copytree(request.getfixturevalue(run), run_dir)
    shutil.rmtree(run_dir / "memory")
    run_pmd("test", "--config", str(run_dir / "config.yaml"), "--ckpt_path", "last", cwd=tmp_path)
    if run == "full_run":  # how a policy is stored makes no difference between the two commands
        done = run_pmd("validate", "--config", "moved/config.yaml", "--ckpt_path", "best", cwd=tmp_path)
        assert "validation tasks x" in done.stdout
    assert not (run_dir / "memory").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"moved"}
    trained = json.loads((run_dir / "results.json").read_text())["phases"]["last"]["avg"]
    tested = json.loads((run_dir / "test-last" / "results.json").read_text())["phases"]["last"]["avg"]
    assert tested == trained


def test_a_memory_of_another_run_is_shown_read_only_and_named_in_every_output(full_run, tmp_path):
    store = RunDir(full_run).memory
    before, run_dir = store.read_bytes(), tmp_path / "run"
    done = run_pmd(
        "test", "--config", "configs/tiny.yaml", *SMALL, f"--run_dir={run_dir}", "--memory", str(full_run),
        "--memory.k=3",
    )  # fmt: skip
    assert "WITH MEMORY" in done.stdout
    assert store.read_bytes() == before
    results = json.loads((run_dir / "test-initial-memory-k3" / "results.json").read_text())
    assert results["memory"] == {"store": str(store), "k": 3}
    assert results["method"] == "pmd with memory, k=3"
    without = json.loads((full_run / "results.json").read_text())["phases"]["initial"]["avg"]
    assert results["phases"]["initial"]["avg"] != without


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_continued(full_run, which, tmp_path):
    run_dir = tmp_path / "run"
    small = ["--config", "configs/tiny.yaml", *SMALL, "--trainer.max_epochs=500", f"--run_dir={run_dir}"]
    process, waiting = start_pmd("fit", *small), time.monotonic()
    while not RunDir(run_dir).last.is_file() and not process.has_ended(0.1) and time.monotonic() < waiting + 200:
        continue
    process.send_signal(which)
    done = process.wait(200)
    said = done.stderr
    assert done.returncode == 130, said
    assert "Traceback" not in said
    assert f"python -m pmd fit --config {run_dir}/config.yaml --ckpt_path last" in said
    epochs = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=False)["epoch"] + 1
    run_pmd("fit", "--config", f"{run_dir}/config.yaml", "--ckpt_path", "last", f"--trainer.max_epochs={epochs + 1}")
    assert (run_dir / "results.json").is_file()
    known = state_of(full_run)
    assert known.keys() == state_of(run_dir).keys()


def test_a_full_disk_leaves_the_last_good_checkpoint(full_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(full_run, run_dir)
    before = (run_dir / "checkpoints" / "last.ckpt").read_bytes()
    resumed = ["--config", str(run_dir / "config.yaml"), "--ckpt_path=last", "--trainer.max_epochs=2"]
    done = run_pmd("fit", *resumed, code=1, file_bytes=1_500_000)
    assert "DiskError" in done.stderr
    assert str(run_dir / "checkpoints") in done.stderr
    assert "Traceback" not in done.stderr
    assert (run_dir / "checkpoints" / "last.ckpt").read_bytes() == before
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
