"""Runs two epochs of the tiny world and prints, as JSON, the files of pmd whose code ran in each part of it.

python tests/record_route.py RUN_DIR
"""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch.trainer.call as calls

import pmd
from pmd.callbacks.checkpoint import CheckpointCallback
from pmd.callbacks.memory import MemoryCallback
from pmd.cli import main as run_command
from pmd.module import PMDModule
from pmd.rollouts.datamodule import RolloutStream

ROOT = Path(pmd.__file__).parent
#: The files of all packages, by part: what runs at every call must be quick.
PARTS = ("training_step", "batch", "epoch_end", "memory_callback", "checkpoint")
FOUND: dict[str, set[str]] = {part: set() for part in PARTS}


def recorded(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call`, with the files that run inside it noted under `part`."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        outer = sys.getprofile()

        def note(frame: Any, event: str, value: object) -> None:
            if event == "call":
                FOUND[part].add(frame.f_code.co_filename)
            if outer is not None:
                outer(frame, event, value)

        sys.setprofile(note)
        threading.setprofile(note)
        try:
            return call(*arguments, **options)
        finally:
            sys.setprofile(outer)
            threading.setprofile(None)  # type: ignore[arg-type]

    return wrapped


def record(run_dir: str) -> None:
    """Train for two epochs, in the second of which the memory drops what is old, and note what runs."""
    PMDModule.training_step = recorded("training_step", PMDModule.training_step)
    MemoryCallback.on_train_epoch_end = recorded("memory_callback", MemoryCallback.on_train_epoch_end)
    CheckpointCallback._write = recorded("checkpoint", CheckpointCallback._write)
    batches, hooks = RolloutStream.__iter__, calls._call_callback_hooks

    def stream(self: RolloutStream) -> Any:
        following = recorded("batch", batches(self).__next__)
        while True:
            try:
                yield following()
            except StopIteration:
                return

    def callback_hooks(trainer: Any, hook: str, *arguments: Any, **options: Any) -> Any:
        call = recorded("epoch_end", hooks) if hook == "on_train_epoch_end" else hooks
        return call(trainer, hook, *arguments, **options)

    RolloutStream.__iter__ = stream
    calls._call_callback_hooks = callback_hooks
    small = [
        "--data.world.families=8",
        "--verification.final_samples=4",
        "--verification.pass_at=[1]",
        "--verification.samples=1",
    ]
    small += ["--memory.keep_generations=1", "--trainer.max_epochs=2", f"--run_dir={run_dir}"]
    assert run_command(["fit", "--config", "configs/tiny.yaml", *small]) == 0


def files_of_pmd(files: set[str]) -> list[str]:
    """Return the files that belong to the package, relative to its folder."""
    paths = [Path(file) for file in files]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT))


def main(arguments: Sequence[str]) -> int:
    """Train for one epoch in RUN_DIR and print what ran."""
    (run_dir,) = arguments
    record(run_dir)
    print(json.dumps({part: files_of_pmd(files) for part, files in FOUND.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
