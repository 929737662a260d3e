"""The directory of one run, and the files in it.

config.yaml      the resolved configuration; `pmd fit --config RUN/config.yaml` repeats the run
metrics.csv      the logged metrics, by step
checkpoints/     last.ckpt and best.ckpt, each with the whole state: weights, optimizer, teacher, memory, position;
                 what ranks have divided is in folders *.shards that they name
memory/          memory.sqlite, its index, and items/: the live items at the end of each epoch
traces/          per-token records of the steps, for `pmd inspect step`
completions/     tables to read: step-N.jsonl of a traced step (prompt, completion, verdict, what the teacher saw),
                 validation-N.jsonl after N steps, test-initial.jsonl, test-last.jsonl and test-best.jsonl
cache/           what vLLM compiled at its first start, for the next one; may be deleted
samples.jsonl    every evaluation sample behind the final table
results.json     the final table
curves.png       the learning curves
error.log        the traceback of what ended the run, if it was nothing that pmd foresaw
.lock            held by the process that works in the directory (run_lock.py)
test-NAME/       results of `pmd test` for checkpoint NAME: results.json, samples.jsonl, pass_at_k.png, completions/; of
                 `pmd test --memory` in test-NAME-memory-kK/
"""

import csv
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmd.atomic import replace_text
from pmd.config.schema import RunConfig
from pmd.errors import ConfigError
from pmd.run_lock import LOCK_FILE, describe_holder

#: Metrics that count the tokens which the policy generated in training, since the row before; and their sum so far.
GENERATED = ("rollout/num_tokens", "reflect/num_tokens", "reflect/num_behaviour_tokens")
GENERATED_SO_FAR = "cost/generated_tokens"
#: What may lie in the directory of a run that failed to start.
LEFT_BY_A_FAILED_START = {"config.yaml", "error.log", "cache", LOCK_FILE}


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def memory(self) -> Path:
        return self.root / "memory" / "memory.sqlite"

    @property
    def items(self) -> Path:
        return self.root / "memory" / "items"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def completions(self) -> Path:
        return self.root / "completions"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def pass_at_k(self) -> Path:
        return self.root / "pass_at_k.png"

    @property
    def error_log(self) -> Path:
        return self.root / "error.log"

    def checkpoint(self, name: str) -> Path:
        """Return the file for `ckpt_path`: `last`, `best`, or a path.

        Raises:
            ConfigError: there is no such file.
        """
        path = self.checkpoints / f"{name}.ckpt" if name in ("last", "best") else Path(name)
        if not path.is_file():
            there = [p.stem for p in sorted(self.checkpoints.glob("*.ckpt"))]
            remedy = f"give {' or '.join(there)}, or the path of a checkpoint." if there else "the run has none yet."
            state = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"ckpt_path={name}: {path} {state}; {remedy}")
        return path

    def check_writable(self) -> None:
        """Check, before anything is computed, that every file of the run can be written.

        Raises:
            ConfigError: names each folder where a file belongs, each file where a folder belongs, and what is
                read-only.
        """
        problems = []
        for file in (
            self.config,
            self.metrics,
            self.last,
            self.best,
            self.memory,
            self.samples,
            self.results,
            self.curves,
        ):
            if file.is_dir():
                problems.append(f"run_dir={self.root}: {file} is a folder where a file belongs; move it away.")
            elif file.exists() and not os.access(file, os.R_OK):
                problems.append(f"run_dir={self.root}: {file} cannot be read; change its permissions.")
        for folder in (self.root, self.checkpoints, self.memory.parent, self.items, self.traces, self.completions):
            if folder.exists() and not folder.is_dir():
                problems.append(f"run_dir={self.root}: {folder} is a file where a folder belongs; move it away.")
            elif folder.is_dir() and (reason := _refuses_files(folder)):
                problems.append(
                    f"run_dir={self.root}: nothing can be written to {folder} ({reason}); make it writable."
                )
        if self.last.is_file() and not problems:
            parts = (sum(f.stat().st_size for f in folder.iterdir()) for folder in self.checkpoints.glob("*.shards"))
            size = self.last.stat().st_size + max(parts, default=0)
            free, needed = (n / 1e6 for n in (shutil.disk_usage(self.root).free, size))
            if free < needed:
                problems.append(f"run_dir={self.root}: a checkpoint takes {needed:.0f} MB, and {free:.0f} MB are free.")
        if problems:
            raise ConfigError(problems)

    def read_metrics(self) -> list[dict[str, str]]:
        """Return the whole rows of metrics.csv, without those that a kill left incomplete; none if there is no file."""
        if not self.metrics.is_file():
            return []
        rows = []
        with self.metrics.open(newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
            for row in csv.DictReader(file):  # an error is a line without end, for example
                if _is_whole(row):
                    rows.append(row)
        return rows


def _is_whole(row: dict[Any, Any]) -> bool:
    """Whether a row has as many fields as the header, all of them numbers or empty, and a step."""
    try:
        return (
            None not in row
            and bool(row["step"])
            and all(value == "" or float(value) is not None for value in row.values())
        )
    except (KeyError, TypeError, ValueError):
        return False


def _refuses_files(folder: Path) -> str:
    """Return why no file can be made in a folder; empty if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def open_run(path: str) -> RunDir:
    """Return the run directory at a path given on the command line.

    Raises:
        ConfigError: the path is not a run directory.
    """
    run_dir = RunDir(Path(path))
    if not run_dir.config.is_file():
        raise ConfigError(f"run={path} holds no config.yaml; give the directory of a run, such as runs/tiny.")
    return run_dir


def choose_run_dir(wanted: str | None, name: str, resume: bool) -> RunDir:
    """Return the directory of a run: the requested one, or the next free `runs/NAME`, `runs/NAME-2`, ...

    Raises:
        ConfigError: the directory cannot be written, or it already holds a run that is not to be resumed.
    """
    if wanted is None:
        if resume:
            raise ConfigError("ckpt_path without run_dir: say which run to resume with --run_dir=runs/NAME.")
        root, number = Path("runs") / name, 1
        while root.exists():
            number += 1
            root = Path("runs") / f"{name}-{number}"
        return RunDir(root)
    root = Path(wanted)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"run_dir={wanted} is a file; give a directory.")
    held = [path.name for path in root.iterdir()] if root.is_dir() else []
    if not resume and set(held) - LEFT_BY_A_FAILED_START:
        resumable = RunDir(root).last.is_file()
        remedy = "resume it with --ckpt_path=last, give another directory," if resumable else "give another directory"
        raise ConfigError(f"run_dir={wanted} is not empty; {remedy} or remove it.")
    existing = next(parent for parent in [root, *root.absolute().parents] if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={wanted} cannot be written: {existing} is read-only; give another directory.")
    return RunDir(root)


def describe_run_dir_problems(command: str, config: RunConfig, config_folder: Path, name: str) -> list[str]:
    """Return what is wrong with run_dir and ckpt_path, without writing anything."""
    try:
        if command == "fit":
            run_dir = fit_run_dir(config, config_folder, name)
        else:
            run_dir = find_run_dir(config, config_folder, name)
        if config.ckpt_path is not None:
            run_dir.checkpoint(config.ckpt_path)
    except ConfigError as error:
        in_use = describe_holder(Path(config.run_dir)) if config.run_dir else ""
        return [in_use] if in_use else error.problems
    return []


def fit_run_dir(config: RunConfig, config_folder: Path, name: str) -> RunDir:
    """Return the directory that `fit` writes to: run_dir; RUN if resuming from RUN/config.yaml; else a new one."""
    resume = config.ckpt_path is not None
    if resume and config.run_dir is None and (config_folder / "checkpoints").is_dir():
        return RunDir(config_folder)
    return choose_run_dir(config.run_dir, name, resume)


def find_run_dir(config: RunConfig, config_folder: Path, name: str) -> RunDir:
    """Return the directory that `validate` and `test` read from and write to.

    This is run_dir if set, else the configuration file's folder if that is a run directory, else, for the untrained
    policy, a new one.
    """
    if config.run_dir is not None:
        return RunDir(Path(config.run_dir))
    if (config_folder / "checkpoints").is_dir():
        return RunDir(config_folder)
    return choose_run_dir(None, name, resume=config.ckpt_path in ("last", "best"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: the file is never half written."""
    replace_text(path, json.dumps(value, indent=1) + "\n")
