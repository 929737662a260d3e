"""`trainer.logger` and `trainer.callbacks` are those of LightningCLI, and come besides those of the run."""

import csv
import json
import re

import pytest
import yaml
from command_line import SMALL, run_pmd

from pmd.cli.trainer import TrainerCLI
from pmd.errors import ConfigError

#: Of kinds that users bring: two loggers, one class by its short name, and callbacks that watch, stop and write.
SECTION = """
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: LOGS, name: mine}
    - class_path: users_own.Journal
      init_args: {path: LOGS/journal.jsonl}
  callbacks:
    - class_path: EarlyStopping
      init_args: {monitor: verify/avg, mode: min, patience: 1, strict: true, min_delta: 1.0}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: ModelCheckpoint
      init_args: {dirpath: LOGS/checkpoints, monitor: verify/avg, save_top_k: 3, filename: "mine-{step}"}
    - class_path: StochasticWeightAveraging
      init_args: {swa_lrs: 0.001, swa_epoch_start: 1}
    - class_path: users_own.CountEpochs
"""
BROKEN = """
from lightning.pytorch.loggers import CSVLogger
class Broken(CSVLogger):
    def __init__(self):
        raise OSError("no server")
"""
OWN = """
import json
from lightning import Callback
from lightning.pytorch.loggers import Logger

class CountEpochs(Callback):
    def __init__(self):
        self.count = 0
    def on_train_epoch_end(self, trainer, module):
        self.count += 1
        module.log("mine/epochs", float(self.count))
    def state_dict(self):
        return {"count": self.count}
    def load_state_dict(self, state):
        self.count = state["count"]

class Journal(Logger):
    name, version = "journal", 0
    def __init__(self, path):
        super().__init__()
        self.path = path
    def _write(self, row):
        with open(self.path, "a") as file:
            print(json.dumps(row), file=file)
    def log_hyperparams(self, params, *args, **kwargs):
        self._write({"memory.k": params["memory"]["k"]})
    def log_metrics(self, metrics, step=None):
        self._write({name: float(value) for name, value in metrics.items()})
"""


def test_a_lightning_users_sections_work_unchanged(tmp_path):
    (tmp_path / "users_own.py").write_text(OWN)
    (tmp_path / "logs").mkdir()
    section = tmp_path / "section.yaml"
    section.write_text(SECTION.replace("LOGS", str(tmp_path / "logs")))
    run_dir = tmp_path / "run"
    fit = ["fit", "--config", "configs/tiny.yaml", *SMALL, f"--run_dir={run_dir}"]
    fit += ["--config", str(section), "--checkpoint_every_steps=1"]  # the scores of EarlyStopping are infinite at first
    run_pmd(*fit, "--trainer.max_epochs=9", first_on_path=tmp_path)
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    assert [row["mine/epochs"] for row in rows if row["mine/epochs"]] == ["1.0", "2.0"]  # stopped by EarlyStopping
    theirs = list(csv.DictReader((tmp_path / "logs/mine/version_0/metrics.csv").open()))
    assert [row["verify/avg"] for row in theirs if row["verify/avg"]] == [
        r["verify/avg"] for r in rows if r["verify/avg"]
    ]
    assert any(row["lr-AdamW"] for row in theirs)
    assert yaml.safe_load((tmp_path / "logs/mine/version_0/hparams.yaml").read_text())["memory"]["k"] == 4
    assert len(list((tmp_path / "logs/checkpoints").glob("mine-*.ckpt"))) == 2
    journal = [json.loads(line) for line in (tmp_path / "logs/journal.jsonl").read_text().splitlines()]
    assert journal[0] == {"memory.k": 4}
    assert sum("verify/avg" in row for row in journal) == 3

    callbacks = "[users_own.CountEpochs, {class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.001}}]"
    resumed = ["--ckpt_path=last", f"--trainer.callbacks={callbacks}", "--trainer.max_epochs=3"]
    run_pmd(*fit, *resumed, first_on_path=tmp_path)
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    assert [row["mine/epochs"] for row in rows if row["mine/epochs"]] == ["1.0", "2.0", "3.0"]


REFUSED = [
    ("logger=nowhere.Logger", "trainer.logger=nowhere.Logger cannot be made (No module named 'nowhere')"),
    (
        "logger=[{class_path: CSVLogger, init_args: {dir: x}}]",
        "trainer.logger=CSVLogger cannot be made (Option 'dir' is not accepted)",
    ),
    (
        "logger=[{class_path: CSVLogger, init_args: {save_dir: x}}, {class_path: users_own.Broken}]",
        "trainer.logger=users_own.Broken cannot be made (OSError: no server)",
    ),
    (
        "callbacks=[{class_path: EarlyStopping, init_args: {monitor: x, patience: three}}]",
        'trainer.callbacks=EarlyStopping cannot be made (Parser key "patience": Expected a',
    ),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_a_class_that_cannot_be_made_is_named_before_anything_loads(given, said, tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    key, _, value = given.partition("=")
    with pytest.raises(ConfigError, match="^" + re.escape(said)):
        TrainerCLI({"accelerator": "cpu", key: yaml.safe_load(value)})


def test_the_command_says_the_same(tmp_path):
    run_dir = tmp_path / "run"
    fit = ["fit", "--config", "configs/tiny.yaml", f"--run_dir={run_dir}"]
    said = run_pmd(*fit, "--trainer.logger=nowhere.Logger", code=2).stderr
    assert "ConfigError: trainer.logger=nowhere.Logger cannot be made" in said
    assert not (run_dir / "config.yaml").exists()
