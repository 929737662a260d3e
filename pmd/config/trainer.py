"""Checks the `trainer` section without importing Lightning, which takes seconds.

The arguments and their types are in `trainer_arguments.json`, which `generate_trainer_arguments.py` writes.
"""

import ctypes
import json
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

from pmd.config.processes import STRATEGIES
from pmd.config.schema import MAX_COUNT
from pmd.config.values import describe, fits, shown, text_problem

ARGUMENTS_FILE = Path(__file__).with_name("trainer_arguments.json")
#: Names of types in the file. A choice is written as {"one of": [...]}.
PLAIN_TYPES: dict[str, Any] = {
    "null": type(None),
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list[int]": list[int],
    "dict[str, int]": dict[str, int],
}
#: Arguments that pmd sets itself or does not use, and what to use instead.
OWN_ARGUMENTS = {
    "accumulate_grad_batches": "rollouts.micro_batch_tokens",
    "gradient_clip_val": "optimizer.max_grad_norm",
    "gradient_clip_algorithm": "optimizer.max_grad_norm",
    "default_root_dir": "run_dir",
    "reload_dataloaders_every_n_epochs": "nothing: every epoch streams fresh rollouts anyway",
    "enable_checkpointing": "nothing: every epoch ends with a checkpoint",
    "enable_model_summary": "nothing: the model is the one that model.path names",
    "check_val_every_n_epoch": "verification.every_epochs",
    "val_check_interval": "verification.every_epochs",
    "num_sanity_val_steps": "nothing: the untrained policy is evaluated anyway",
    "limit_train_batches": "data.max_train",
    "limit_val_batches": "data.max_validation",
    "limit_test_batches": "data.max_test",
    "limit_predict_batches": "nothing: pmd has no predict loop",
    "overfit_batches": "data.max_train",
    "fast_dev_run": "data.max_train and trainer.max_epochs=1",
    "barebones": "trace_every=0",
    "inference_mode": "nothing: evaluation needs no gradient",
    "use_distributed_sampler": "nothing: every rank draws its share of each batch itself",
    "sync_batchnorm": "nothing: no model here has batch norms",
    "plugins": "trainer.precision",
}
#: Precisions of the forward pass; model.dtype is that of the weights. None of them scales the loss, because gradients
#: are clipped without unscaling.
PRECISIONS = ("32-true", "32", 32, "bf16-mixed", "bf16")
#: Narrower than Lightning's own annotation.
OWN_TYPES: dict[str, Any] = {
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "strategy": Literal[("auto", *STRATEGIES)],
    "precision": Union[Literal[PRECISIONS], None],  # noqa: UP007  (a Literal of a tuple has no | for type checkers)
    "deterministic": bool | Literal["warn"] | None,
    "profiler": Literal["simple", "advanced", "pytorch", "xla"] | None,
    "max_time": str | dict[str, int] | None,
}
#: Arguments that name classes as in LightningCLI: the user's own, which are added to those of the run.
CLASSES = {"logger": "lightning.pytorch.loggers.CSVLogger", "callbacks": "lightning.pytorch.callbacks.EarlyStopping"}
CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
#: Arguments that count devices and nodes, and all the values with which Lightning means one.
COUNTS = ("devices", "num_nodes")
ONE_DEVICE = (1, "1", "auto", [0])
MAX_DEVICES = 1 << 16
UNITS = ("days", "hours", "minutes", "seconds")
SECONDS = {
    "weeks": 604_800, "days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1, "milliseconds": 1e-3,
    "microseconds": 1e-6,
}  # fmt: skip
MAX_DAYS = 10_000
MINIMUM = {"max_epochs": 1, "min_epochs": 1, "max_steps": 1, "min_steps": 1, "log_every_n_steps": 1}
NO_LIMIT = ("max_steps", -1)  # Lightning's default


def trainer_problems(trainer: dict[str, Any]) -> list[str]:
    """Return a sentence for each argument of the section that cannot be used."""
    types, problems = accepted_types(), []
    for key, value in trainer.items():
        if key in OWN_ARGUMENTS:
            problems.append(f"trainer.{key}={shown(value)} is set by pmd; use {OWN_ARGUMENTS[key]}.")
        elif key not in types:
            close = get_close_matches(str(key), types.keys() - OWN_ARGUMENTS.keys(), n=1)
            remedy = f"did you mean trainer.{close[0]}?" if close else "check the spelling."
            problems.append(f"trainer.{key}={shown(value)} is not an argument of Lightning's Trainer; {remedy}")
        elif key in CLASSES:
            problems += _class_problems(key, value)
        elif key in COUNTS:
            problems += _count_problems(key, value, trainer.get("strategy"))
        else:
            problems += _value_problems(key, value, types[key])
    return problems


def _count_problems(key: str, value: Any, strategy: Any) -> Iterator[str]:
    """Check a number of devices or nodes: more than one needs a strategy."""
    if value in ONE_DEVICE:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_DEVICES:
        yield f"trainer.{key}={shown(value)} must be a whole number from 1 to {MAX_DEVICES}."
    elif strategy not in STRATEGIES:
        yield (
            f"trainer.{key}={shown(value)} needs trainer.strategy=ddp, or fsdp2 for a model that is too large for one "
            "device; without it, pmd trains on one device: use 1."
        )


def _class_problems(key: str, value: Any) -> Iterator[str]:
    """Check the form of `class_path` and `init_args`; the classes are imported when the trainer is built."""
    if value is None or (key == "logger" and isinstance(value, bool)):
        return
    entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries):
        path = f"trainer.{key}[{number}]" if isinstance(value, list) else f"trainer.{key}"
        name = entry.get("class_path") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or text_problem(name):
            yield (
                f"{path}={shown(entry)} must name a class; write class_path: {CLASSES[key]}, and its arguments as "
                "init_args: {name: value}."
            )
        elif isinstance(entry, dict) and (unknown := entry.keys() - CLASS_KEYS):
            yield f"{path}.{shown(min(map(str, unknown)))} is not known; arguments of the class go into init_args."


def _value_problems(key: str, value: Any, hint: Any) -> Iterator[str]:
    if not fits(value, hint):
        remedy = "; model.dtype is the precision of the weights" if key == "precision" else ""
        yield f"trainer.{key}={shown(value)} must be {describe(hint)}{remedy}."
    elif key in MINIMUM and isinstance(value, int) and value < MINIMUM[key] and (key, value) != NO_LIMIT:
        yield f"trainer.{key}={shown(value)} must be at least {MINIMUM[key]}."
    elif key in MINIMUM and isinstance(value, int) and value > MAX_COUNT:
        yield f"trainer.{key}={shown(value)} must be at most {MAX_COUNT}."
    elif value in ("gpu", "cuda") and key == "accelerator" and not cuda_is_available():
        yield f"trainer.accelerator={value} needs a CUDA device and none was found; use cpu or auto."
    elif key == "max_time" and isinstance(value, str | dict) and not _is_duration(value):
        yield (
            f"trainer.max_time={shown(value)} must be DD:HH:MM:SS, for example 00:02:30:00, or a mapping such as "
            "{hours: 2}, of at most 10000 days."
        )
    elif isinstance(value, str) and (problem := text_problem(value)):
        yield f"trainer.{key}={shown(value)} {problem}."


def _is_duration(value: str | dict[str, int]) -> bool:
    """Whether the time is of a form that Lightning reads, above 0 and of at most `MAX_DAYS`."""
    lengths = value
    if isinstance(lengths, str):
        parts = lengths.split(":")
        if len(parts) != len(UNITS) or not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
            return False
        lengths = dict(zip(UNITS, map(int, parts), strict=True))
    if not lengths.keys() <= SECONDS.keys() or any(number < 0 for number in lengths.values()):
        return False
    return 0 < sum(number * SECONDS[unit] for unit, number in lengths.items()) <= MAX_DAYS * SECONDS["days"]


@cache
def cuda_is_available() -> bool:
    """Whether the driver reports a CUDA device, without loading torch."""
    return num_cuda_devices() > 0


@cache
def num_cuda_devices() -> int:
    """Return how many CUDA devices the driver reports to this process, without loading torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@cache
def accepted_types() -> dict[str, Any]:
    """Return the type of each argument of the Trainer, as narrowed by pmd; Any if only Lightning's classes fit."""
    arguments = json.loads(ARGUMENTS_FILE.read_text(encoding="utf-8"))["arguments"]
    return {name: OWN_TYPES.get(name, _type_of(options)) for name, options in arguments.items()}


def _type_of(options: list[Any]) -> Any:
    if not options:
        return Any
    types = [PLAIN_TYPES[o] if isinstance(o, str) else Literal[tuple(o["one of"])] for o in options]
    return Union[tuple(types)]  # noqa: UP007  (the types are not known before the file is read)
