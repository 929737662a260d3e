"""The packages of the loggers that people use, several at once, get a run's metrics, configuration and tables.

Needs tensorboard, mlflow, wandb and trackio; nothing leaves the machine.
"""

import json
import sqlite3

import pytest
from command_line import ROOT, small_fit

SECTION = """
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {save_dir: LOGS, name: tensorboard}
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: LOGS, name: csv}
    - class_path: lightning.pytorch.loggers.MLFlowLogger
      init_args: {experiment_name: pmd, tracking_uri: "sqlite:///LOGS/mlflow.db", artifact_location: LOGS/artifacts}
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {project: pmd, offline: true, save_dir: LOGS}
    - class_path: trackio_logger.TrackioLogger
      init_args: {project: pmd, name: first}
  callbacks:
    - class_path: EarlyStopping
      init_args: {monitor: verify/avg, mode: max, patience: 3}
    - class_path: LearningRateMonitor
      init_args: {logging_interval: step}
    - class_path: ModelCheckpoint
      init_args: {dirpath: LOGS/checkpoints, monitor: verify/avg, mode: max}
    - class_path: DeviceStatsMonitor
    - class_path: RichProgressBar
    - class_path: Timer
      init_args: {duration: "00:01:00:00"}
"""


@pytest.mark.slow
def test_five_loggers_and_six_callbacks_at_once(tmp_path):
    for package in ("tensorboard", "mlflow", "wandb", "trackio"):
        pytest.importorskip(package)
    logs, section = tmp_path / "logs", tmp_path / "section.yaml"
    logs.mkdir()
    section.write_text(SECTION.replace("LOGS", str(logs)))
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_SILENT": "true"}
    small_fit(
        tmp_path / "run", 2, "--config", str(section),
        environment=environment, first_on_path=ROOT / "docs" / "loggers",
    )  # fmt: skip

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / "tensorboard" / "version_0"))
    events.Reload()
    scores = [event.value for event in events.Scalars("verify/avg")]
    assert len(scores) == 3
    assert "completions/text_summary" in events.Tags()["tensors"]

    with sqlite3.connect(logs / "mlflow.db") as database:
        found = database.execute("select value from metrics where key = 'verify/avg' order by step").fetchall()
    assert [value for (value,) in found] == pytest.approx(scores)
    assert list(logs.glob("artifacts/*/artifacts/completions/step-*.json"))

    assert list(logs.glob("wandb/offline-run-*/files/media/table/completions_*.table.json"))

    with sqlite3.connect(tmp_path / "trackio" / "pmd.db") as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
        (config,) = database.execute("select config from configs").fetchone()
    assert [row["verify/avg"] for row in rows if "verify/avg" in row] == pytest.approx(scores)
    assert next(row for row in rows if "completions" in row)["completions"]["_type"] == "trackio.table"
    assert json.loads(config)["memory"]["k"] == 4

    assert list((logs / "checkpoints").glob("*.ckpt"))
    assert (logs / "csv" / "version_0" / "hparams.yaml").is_file()
