"""Builds Lightning's Trainer from the `trainer` section, and silences warnings that do not apply to pmd."""

import logging
import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from pmd.callbacks.checkpoint import VerifiedCheckpointIO
from pmd.callbacks.progress import ProgressCallback
from pmd.errors import ConfigError
from pmd.ranks import Ranks

#: Warnings that Lightning gives in every run, but that do not apply: rollouts are streamed, batches stay on the host,
#: teachers are in eval mode.
UNTRUE_WARNINGS = (
    "does not have many workers",
    "`isinstance.treespec",
    "LightningCLI's args parameter",
    "Your `IterableDataset` has `__len__` defined",
    r"Found \d+ module\(s\) in eval mode",
    "You have overridden `transfer_batch_to_device`",
    "GPU available but not used",
    "It is recommended to use `self.log",
    "You're resuming from a checkpoint that ended before the epoch ended",  # the data knows which tasks are left
)


class TrainerCLI(LightningCLI):
    """LightningCLI for the `trainer` section only: it checks Lightning's own arguments and builds the Trainer."""

    def __init__(self, trainer: dict[str, Any]):
        quieten()
        defaults = {"max_epochs": 1, "accelerator": "auto", "devices": 1, "log_every_n_steps": 1}
        try:
            super().__init__(
                LightningModule,
                run=False,
                args={"trainer": deepcopy(trainer)},  # jsonargparse changes what it is given
                save_config_callback=None,
                seed_everything_default=False,
                trainer_defaults=defaults | {"num_sanity_val_steps": 0, "enable_model_summary": False},
                parser_kwargs={"exit_on_error": False},
            )
            self.trainer_for([], [], Path())  # bad arguments fail now, before any weights load
        except Exception as error:  # of Lightning, jsonargparse, or a user's logger or callback
            raise ConfigError(describe_class_problems(trainer) or f"trainer: {_said(error)}") from error

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add the trainer only; pmd's sections are checked and built without jsonargparse."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})

    def instantiate_classes(self) -> None:
        """Leave the Trainer to `trainer_for`, which gets the callbacks and loggers."""
        self.config_init = self.parser.instantiate_classes(self.config)

    def trainer_for(
        self, callbacks: list[Callback], loggers: list[Logger], root: Path, ranks: Ranks | None = None
    ) -> Trainer:
        """Return a trainer with these callbacks and loggers, in this order, then those of the configuration.

        The trainer itself writes nothing outside `root`.
        """
        given = dict(self.config_init["trainer"])
        if ranks is None:  # a strategy for several devices in one process is a strategy for one
            given |= {"strategy": "auto", "devices": 1, "num_nodes": 1}
        else:
            given["strategy"] = DividedWeights() if ranks.shards else SummedGradients()
        sharing = ranks if ranks is not None and ranks.shards else None
        theirs = _as_list(given["callbacks"])
        has_bar = any(isinstance(callback, ProgressBar) for callback in theirs)
        is_first = ranks is None or ranks.is_first
        progress = ProgressCallback(bar=given["enable_progress_bar"] is not False and not has_bar and is_first)
        own = {
            "callbacks": [*callbacks, progress, *theirs],
            "enable_progress_bar": has_bar,  # Lightning's would be a second one
            "logger": [*loggers, *_as_list(given["logger"])],
            # Whatever the environment says: a cluster's would requeue the job with checkpoints of its own.
            "plugins": [VerifiedCheckpointIO(sharing), LightningEnvironment()],
            "default_root_dir": root,
            "reload_dataloaders_every_n_epochs": 1,  # a resumed epoch is shorter than the next
        }
        return Trainer(**(given | own))


def device_of(trainer: Mapping[str, Any]) -> torch.device:
    """Return the device on which the `trainer` section trains, without its loggers and callbacks."""
    quieten()
    plain = Trainer(
        accelerator=trainer.get("accelerator", "auto"),
        devices=1,
        plugins=LightningEnvironment(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return plain.strategy.root_device


class SummedGradients(DDPStrategy):
    """One process a device, with the whole model in each. The module itself sums gradients, once an optimizer step.

    DistributedDataParallel would average gradients at every backward pass, of which ranks have different numbers.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class DividedWeights(SummedGradients):
    """One process a device, with a part of the weights in each: the module has divided them (sharding.py)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint together with the other ranks."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def describe_class_problems(trainer: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with each logger and callback of the section, tried one by one.

    The error of the whole section lists every form that a value may have, and not which class failed.
    """
    problems = []
    for key, kind in (("logger", Logger), ("callbacks", Callback)):
        for entry in _as_list(trainer.get(key)):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(kind, key, required=True)
            try:
                parser.instantiate_classes(parser.parse_object({key: deepcopy(entry)}))
            except Exception as error:  # of the class, whatever it raises
                chain: list[BaseException] = [error]
                while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
                    chain.append(cause)
                told = next((_said(one) for one in chain if "Union subtypes" not in str(one)), _said(error))
                name = entry.get("class_path", entry) if isinstance(entry, dict) else entry
                told = re.sub(r"^Problem with given class_path '[^']*': ", "", told).rstrip(".")
                remedy = "give a class by its import path, and init_args that it takes."
                problems.append(f"trainer.{key}={name} cannot be made ({told}); {remedy}")
    return problems


def _said(error: BaseException) -> str:
    """Return an error's text on one line, with the name of its kind if that may say something."""
    text = " ".join(str(error).split())
    usual = isinstance(error, ArgumentError | MisconfigurationException | ValueError | TypeError)
    return text if usual else f"{type(error).__name__}: {text}"


def _as_list(given: Any) -> list[Any]:
    """Return the objects that were given as one, as a list, or as true, false or null for none."""
    if given is None or isinstance(given, bool):
        return []
    return list(given) if isinstance(given, list) else [given]


def quieten() -> None:
    """Silence Lightning's hardware notes, its tips, and the warnings that do not apply."""
    for message in UNTRUE_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
