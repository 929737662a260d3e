"""An export is whole or not there, and a file that has nothing to do with the weights cannot prevent it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import run_pmd
from transformers import AutoModelForCausalLM, GenerationConfig

from pmd.cli.export import complete_folder, push_to_hub, save_student
from pmd.cli.model_card import model_card
from pmd.config.load import load_config
from pmd.config.schema import ModelConfig, RunConfig
from pmd.errors import ConfigError, DiskError
from pmd.module import PMDModule
from pmd.run_dir import RunDir
from pmd.tiny import shipped_model_path

#: Generation settings that transformers loads and refuses to save.
UNSAVABLE = [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.95},
    {"do_sample": False, "top_k": 20},
    {"do_sample": False, "min_p": 0.1, "typical_p": 0.9},
    {"early_stopping": True, "num_beams": 1, "length_penalty": 2.0},
]


def module_with(folder: Path, **settings) -> PMDModule:
    base = Path(shutil.copytree(shipped_model_path("tiny"), folder / "base"))
    (base / "generation_config.json").write_text(json.dumps(settings))
    return PMDModule(RunConfig(model=ModelConfig(path=str(base))))


@pytest.mark.parametrize("settings", UNSAVABLE, ids=lambda s: "-".join(s))
def test_generation_settings_of_the_base_cannot_prevent_an_export(tmp_path, settings):
    module = module_with(tmp_path, eos_token_id=2, **settings)
    with complete_folder(tmp_path / "out") as folder:
        save_student(module, folder, is_adapter=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert all(getattr(written, name) == value for name, value in settings.items())
    assert written.eos_token_id == 2
    ids = torch.arange(5)[None]
    with module.policy.weights("student") as model, torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits.float())


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    def fail(error):
        with complete_folder(tmp_path / "new" / "out") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(DiskError, match=r"--out=.*out cannot be written \(disk is full\); nothing was exported"):
        fail(OSError("disk is full"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert list((tmp_path / "new").iterdir()) == []


def test_an_export_replaces_an_empty_folder_and_what_a_killed_one_left(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    with complete_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_full_disk_during_an_export_is_reported(full_run, tmp_path):
    said = run_pmd("export", str(full_run), "--out", str(tmp_path / "out"), code=1, file_bytes=50_000).stderr
    assert "DiskError: --out=" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_the_student(lora_run, tmp_path):
    out = tmp_path / "merged"
    run_pmd("export", str(lora_run), "--out", str(out), "--merge")
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert not list(out.glob("adapter*"))
    module = PMDModule(load_config([lora_run / "config.yaml"]).run)
    state = torch.load(lora_run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    module.load_state_dict(state, strict=False)
    merged = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), module.policy.weights("student") as student:
        found, expected = merged.eval()(ids).logits, student.eval()(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # another order of products
        base = AutoModelForCausalLM.from_pretrained(shipped_model_path("tiny"))
    assert not torch.allclose(merged(ids).logits.float(), base(ids).logits.float())
    said = run_pmd("export", str(lora_run), "--out", str(out), "--merge", code=2).stderr
    assert "not empty" in said


def test_the_model_card_says_how_the_model_was_made(full_run, lora_run, tmp_path):
    run_pmd("export", str(full_run), "--out", str(tmp_path / "full"))
    run_pmd("export", str(lora_run), "--out", str(tmp_path / "lora"))
    full, lora = ((tmp_path / name / "README.md").read_text() for name in ("full", "lora"))
    results = json.loads((full_run / "results.json").read_text())
    last = results["phases"]["last"]
    assert f"| last | {100 * last['avg']:.1f} | {100 * last['avg_error']:.1f} |" in full
    assert f"| rollouts | {results['rollouts']:,} |" in full
    assert "library_name: transformers" in full
    assert "library_name: peft" in lora
    assert "LoRA, rank 4" in lora
    front = yaml.safe_load(full.split("---")[1])
    assert front["base_model"] == "tiny"
    assert front["tags"] == ["pmd"]
    assert "license" not in front


def test_a_card_without_results_and_with_a_licence(full_run, tmp_path):
    base = tmp_path / "base|<b>"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    config = load_config([full_run / "config.yaml"], [f"model.path={base}"]).run
    card = model_card(RunDir(tmp_path), config, tmp_path / "last.ckpt", is_adapter=False)
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "not evaluated to its end" in card
    assert "<b>" not in card.split("---", 2)[2]  # the front matter is YAML, the rest is Markdown


def test_an_upload_that_fails_names_the_folder(monkeypatch, tmp_path):
    class Api:
        def create_repo(self, repository, **options):
            assert options == {"private": True, "exist_ok": True}
            return f"https://hub/{repository}"

        def upload_folder(self, **options):
            if options["repo_id"] == "me/no":
                raise OSError("no network")
            assert options["folder_path"] == tmp_path

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(tmp_path, "me/yes") == "https://hub/me/yes"
    with pytest.raises(ConfigError, match=r"--push-to-hub=me/no: not uploaded \(OSError: no network\)"):
        push_to_hub(tmp_path, "me/no")
