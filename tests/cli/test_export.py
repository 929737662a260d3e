"""An export is whole or not there, and a file that has nothing to do with the weights cannot prevent it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run_pmd
from transformers import AutoModelForCausalLM, GenerationConfig

from pmd.cli.export import complete_folder, save_student
from pmd.config.schema import ModelConfig, RunConfig
from pmd.errors import DiskError
from pmd.module import PMDModule
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
