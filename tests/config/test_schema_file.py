"""configs/schema.json is what `pmd config schema` prints, and it accepts and refuses what `fit` does."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from pmd.config.json_schema import json_schema
from pmd.config.load import load_config
from pmd.config.trainer import trainer_problems

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "ablations").glob("*.yaml"))]
VALIDATOR = Draft202012Validator(json_schema())
#: Values that both accept, and values that both refuse, where a schema could get it wrong.
RIGHT = [
    "wandb=false", "wandb=offline", "wandb.tags=[a]", "wandb={mode: online, group: g}",
    "objective.alpha=symmetric", "objective.alpha=1", "objective.top_k=null",
    "teacher.refresh_epochs=2", "memory.levels=[0,2]", "data.domains=[physics]", "optimizer.lr=1",
    "trainer.devices=1", "trainer.precision=32", "trainer.max_steps=-1",
    "trainer.max_time={hours: 2}", "trainer.deterministic=warn",
    "trainer.logger=false", "trainer.logger=CSVLogger", "trainer.callbacks=[{class_path: LearningRateMonitor}]",
    "trainer.callbacks={class_path: mine.C, init_args: {n: 1}}",
]  # fmt: skip
WRONG = [
    "memory.kk=3", "memroy.k=3", "optimizer.lr=fast", "optimizer.lr=0", "objective.alpha=1.5", "objective.alpha=both",
    "objective.top_k=0", "memory.enabled=1", "memory.k=true", "memory.levels=[3]", "memory=3", "model.lora_dropout=1",
    "data.world.boxes=5", "seed_everything=-1", "trainer.max_epochs=0", "trainer.max_steps=many",
    "trainer.max_steps=0", "trainer.max_epochs=-1",
    "trainer.logger=3", "trainer.callbacks=[{init_args: {}}]", "trainer.callbacks={class_path: C, n: 1}",
    "trainer.callbacks=true", "wandb=on", "wandb.mode=yes please",
    "trainer.max_epoch=3", "trainer.devices=0", "trainer.precision=16-mixed", "trainer.accelerator=gpuu",
]  # fmt: skip


def errors(plain: object) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(plain)]


def test_the_schema_is_up_to_date():
    written = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert json.loads(written) == json_schema(), "run: python -m pmd config schema > configs/schema.json"


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("file", SHIPPED, ids=[file.relative_to(ROOT).as_posix() for file in SHIPPED])
def test_a_shipped_file_names_the_schema_and_fits_it(file):
    first = file.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (file.parent / first.removeprefix(prefix)).resolve() == ROOT / "configs" / "schema.json"
    assert errors(OmegaConf.to_container(OmegaConf.load(file))) == []


@pytest.mark.parametrize(("override", "is_right"), [*((o, True) for o in RIGHT), *((o, False) for o in WRONG)])
def test_the_schema_agrees_with_fit(override, is_right):
    loaded = load_config([], [override])
    assert (loaded.problems + trainer_problems(loaded.trainer) == []) == is_right
    assert (errors(OmegaConf.to_container(OmegaConf.from_dotlist([override]))) == []) == is_right


def test_an_interpolation_may_stand_for_any_value():
    assert errors({"rollouts": {"group_size": "${oc.env:GROUP}", "tasks_per_step": "${rollouts.group_size}"}}) == []
    assert errors({"rollouts": {"group_size": "eight"}}) != []
