"""The `trainer` section in; what Lightning would refuse out, in words, without importing Lightning (it takes seconds).

Names and types are read from the source of Lightning's Trainer, so they are those of the installed version.
"""

import ast
import ctypes
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union

from pmd.config.load import describe, fits, shown
from pmd.errors import ConfigError

#: Trainer arguments that this program sets itself or does not use, and where to say the same thing.
OWN_ARGUMENTS = {
    "callbacks": "the sections verification, reflection and memory",
    "logger": "run_dir (metrics.csv) and wandb",
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
    "limit_predict_batches": "nothing: nothing is predicted",
    "overfit_batches": "data.max_train",
    "fast_dev_run": "data.max_train and trainer.max_epochs=1",
    "barebones": "trace_every=0",
    "inference_mode": "nothing: evaluation needs no gradient",
    "use_distributed_sampler": "nothing: pmd trains on one device",
    "sync_batchnorm": "nothing: pmd trains on one device",
    "plugins": "trainer.precision",
}
#: Of the forward pass alone: model.dtype is that of the weights. Gradients are clipped as they are, so no loss scaling.
PRECISIONS = ("32-true", "32", 32, "bf16-mixed", "bf16")
#: Narrower than Lightning's own annotation, because pmd trains on one device.
OWN_TYPES: dict[str, Any] = {
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "strategy": Literal["auto"],
    "precision": Union[Literal[PRECISIONS], None],  # noqa: UP007  (a Literal of a tuple has no | for type checkers)
    "deterministic": bool | Literal["warn"] | None,
    "profiler": Literal["simple", "advanced", "pytorch", "xla"] | None,
    "max_time": str | dict[str, int] | None,
}
MINIMUM = {"max_epochs": 1, "min_epochs": 1, "max_steps": 1, "min_steps": 1, "log_every_n_steps": 1}


def trainer_problems(trainer: dict[str, Any]) -> list[str]:
    """Return one sentence for each argument of the section that cannot be used."""
    annotations, problems = _annotations(), []
    for key, value in trainer.items():
        if key in OWN_ARGUMENTS:
            problems.append(f"trainer.{key}={shown(value)} is set by pmd; use {OWN_ARGUMENTS[key]}.")
        elif key not in annotations:
            close = get_close_matches(str(key), annotations.keys() - OWN_ARGUMENTS.keys(), n=1)
            remedy = f"did you mean trainer.{close[0]}?" if close else "check the spelling."
            problems.append(f"trainer.{key}={shown(value)} is not an argument of Lightning's Trainer; {remedy}")
        elif key in ("devices", "num_nodes"):
            if value not in (1, "1", "auto", [0]):
                problems.append(f"trainer.{key}={shown(value)} is not supported: pmd trains on one device; use 1.")
        else:
            problems += _value_problems(key, value, annotations[key])
    return problems


def _value_problems(key: str, value: Any, hint: Any) -> Iterator[str]:
    if not fits(value, hint):
        remedy = "; model.dtype is the precision of the weights" if key == "precision" else ""
        yield f"trainer.{key}={shown(value)} must be {describe(hint)}{remedy}."
    elif key in MINIMUM and isinstance(value, int) and value < MINIMUM[key]:
        yield f"trainer.{key}={value} must be at least {MINIMUM[key]}."
    elif value in ("gpu", "cuda") and key == "accelerator" and not cuda_is_available():
        yield f"trainer.accelerator={value} needs a CUDA device and none was found; use cpu or auto."
    elif key == "max_time" and isinstance(value, str) and not _is_duration(value):
        yield f"trainer.max_time={value} must be DD:HH:MM:SS, for example 00:02:30:00."


def _is_duration(text: str) -> bool:
    parts = text.split(":")
    return len(parts) == 4 and all(part.isdigit() for part in parts)


@cache
def cuda_is_available() -> bool:
    """Ask the driver whether there is a device, without loading torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@cache
def _annotations() -> dict[str, Any]:
    """Read names and types of the Trainer's arguments from its source."""
    package = find_spec("lightning")
    if package is None or package.origin is None:
        raise ConfigError("lightning is not installed; pip install pmd.")
    source = Path(package.origin).parent / "pytorch" / "trainer" / "trainer.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    init = next(
        item
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "Trainer"
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    )
    arguments = {a.arg: a.annotation for a in [*init.args.args, *init.args.kwonlyargs] if a.arg != "self"}
    return {name: OWN_TYPES.get(name, _evaluated(annotation)) for name, annotation in arguments.items()}


def _evaluated(annotation: ast.expr | None) -> Any:
    """Return the type that an annotation of plain types means; anything, where it names a class of Lightning's."""
    plain = (int, float, str, bool, dict, list)
    names = {"Optional": typing.Optional, "Union": typing.Union} | {kind.__name__: kind for kind in plain}
    try:
        return eval(ast.unparse(annotation), {"__builtins__": {}}, names) if annotation is not None else Any
    except (NameError, TypeError):
        return Any
