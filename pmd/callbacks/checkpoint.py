"""Writes checkpoints atomically, and lets the run directory be moved."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pmd.errors import DiskError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file and renames it: a full disk or a kill leaves the previous checkpoint in place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            DiskError: it could not be written; the previous file at `path` is untouched.
        """
        path = Path(path)
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            part.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else f"{error}".splitlines()[0]
            kept = f"the last good one, {path}, is kept" if path.is_file() else "there is none to fall back on"
            raise DiskError(
                f"checkpoint={path} could not be written ({reason}); {kept}: free space and resume."
            ) from error


class MovableCheckpoint(ModelCheckpoint):
    """Keeps the best score so far when the run directory is moved or copied; Lightning's own class forgets it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, with its paths changed to this run's own folder."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"best_k_models": best, "dirpath": self.dirpath})
