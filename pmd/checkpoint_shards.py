"""The tensors of a checkpoint that ranks have divided (sharding.py), written and read by torch.distributed.checkpoint.

Each rank writes its parts into one safetensors file, in a folder beside the checkpoint. The checkpoint itself, written
last, names the folder and the SHA-256 of its files, and holds an empty placeholder (a meta tensor) for each of the
tensors. So all is replaced at once: until then the earlier checkpoint names the earlier folder. Any number of ranks
reads them, one included, and each reads its own parts only. The files hold numbers and names, so reading runs no code.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from pmd.atomic import sync_folder
from pmd.checkpoint_file import read_checkpoint, write_checkpoint
from pmd.errors import CheckpointError, DiskError
from pmd.ranks import Ranks
from pmd.sharding import own_part

SUFFIX = ".shards"


def write_divided(path: Path, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint of which each rank holds a part; all ranks call this together.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        DiskError: something could not be written; the last good checkpoint is kept.
    """
    tensors: dict[str, DTensor] = {}

    def take_out(name: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensors[name] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    rest = _mapped(state, take_out)
    _refuse_non_finite(path, tensors, ranks)
    if tensors:
        folder = path.parent / ranks.from_first(lambda: f"{path.stem}-{uuid4().hex[:8]}{SUFFIX}")
        tied = ranks.from_first(lambda: _tied(tensors))
        written = {name: value for name, value in tensors.items() if name not in tied}
        digests = _write_shards(path, folder, written, ranks)
        rest["pmd"]["shards"] = {"folder": folder.name, "sha256": digests, "tied": tied}
    ranks.from_first(lambda: write_checkpoint(path, rest))
    if ranks.is_first:
        remove_unnamed(path.parent)


def _tied(tensors: Mapping[str, DTensor]) -> dict[str, str]:
    """Return the other name of each tensor that is the same as an earlier one, such as an output head."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(value.to_local().data_ptr(), name) for name, value in tensors.items()}
    return {name: other for name, other in names.items() if other != name}


def _refuse_non_finite(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    bad = [name for name, value in tensors.items() if not torch.isfinite(own_part(value)).all()]
    found = [name for names in ranks.all(bad) for name in names]
    if found:
        raise CheckpointError(
            f"checkpoint={path} was not written, because {found[0]} holds values that are not finite; the last good "
            "one is kept: resume from it with a lower optimizer.lr."
        )


def _write_shards(path: Path, folder: Path, tensors: dict[str, DTensor], ranks: Ranks) -> dict[str, str]:
    """Write all ranks' parts; return the SHA-256 of each file."""
    # Newer than the oldest torch that pmd runs with.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with ranks.naming_loss("writing a checkpoint"):
            save(tensors, storage_writer=writer, process_group=ranks.objects)
        own = {file.name: _sha256(file) for file in folder.glob(f"shard-{ranks.rank + 1:05d}-*")}
        sync_folder(folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
        reason = " ".join(str(failures[0] if failures else error).split())[:200]
        raise DiskError(
            f"checkpoint={path}: its tensors could not be written to {folder} ({reason}); the last good one is kept: "
            "free space and resume."
        ) from error
    return {name: digest for part in ranks.all(own) for name, digest in part.items()}


def remove_unnamed(checkpoints: Path) -> None:
    """Remove the folders that no checkpoint names any more, or yet: a kill left them."""
    try:
        named = {read_checkpoint(file)["pmd"].get("shards", {}).get("folder") for file in checkpoints.glob("*.ckpt")}
    except CheckpointError:
        return  # who knows which one the damaged file names
    for folder in checkpoints.glob(f"*{SUFFIX}"):
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def filled(state: Mapping[str, Any], like: Mapping[str, Tensor], ranks: Ranks | None) -> dict[str, Any]:
    """Return a checkpoint with its tensors instead of their placeholders.

    Args:
        state: as `read_checkpoint` returned it, with placeholders.
        like: by their names in the checkpoint, with dots, tensors of which this rank needs a part, divided alike.
        ranks: those that divide the weights and call this together; None reads whole tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    shards = state["pmd"]["shards"]
    folder, files = Path(shards["path"]), sorted(shards["sha256"])
    damaged = [
        folder / name
        for name in (files if ranks is None else files[ranks.rank :: ranks.size])
        if not (folder / name).is_file() or _sha256(folder / name) != shards["sha256"][name]
    ]
    found = damaged if ranks is None else [file for part in ranks.all(damaged) for file in part]
    if found:
        raise CheckpointError(
            f"{found[0]}, which holds a part of a checkpoint's tensors, is missing or damaged; use another checkpoint. "
            "Whoever copies one must copy the folder that it names as well."
        )
    targets: dict[str, Tensor] = {}

    def take_up(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta and name not in shards["tied"]:
            owner = like.get(name)
            is_divided = isinstance(owner, DTensor)
            targets[name] = torch.empty_like(owner) if is_divided else torch.empty(value.shape, dtype=value.dtype)
        return value

    _mapped(state, take_up)
    reader = HuggingFaceStorageReader(str(folder))
    group = None if ranks is None else ranks.objects
    load(targets, storage_reader=reader, process_group=group, no_dist=ranks is None)
    return _mapped(state, lambda name, value: targets.get(shards["tied"].get(name, name), value))


def divided(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a checkpoint with this rank's parts of what `like` divides; nothing in it stays on the disk."""

    def part_of(name: str, value: Any) -> Any:
        owner = like.get(name)
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        if not isinstance(owner, DTensor):
            return value.clone()
        return distribute_tensor(value, owner.device_mesh, owner.placements, src_data_rank=None).clone()

    return _mapped(state, part_of)


def _mapped(value: Any, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """Return nested dicts and lists with `function` applied to what lies in them, by name."""
    if isinstance(value, Mapping):
        return {key: _mapped(part, function, f"{name}.{key}" if name else str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, function, f"{name}.{number}") for number, part in enumerate(value)]
    return function(name, value)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
