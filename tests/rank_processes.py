"""Runs a function on several ranks at once: forked processes that share a gloo process group."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pmd.ranks import Ranks

CONTEXT = multiprocessing.get_context("fork")


class Rank(NamedTuple):
    """Which rank a process is to be."""

    rank: int
    size: int
    shards: bool


def on_ranks(size: int, folder: Path, function: Callable[[Ranks], Any], *, shards: bool = False) -> list[Any]:
    """Return what `function` returns on each rank; raise if one of them raised.

    Args:
        shards: the ranks divide the weights.
    """
    meeting = folder / f"meeting-{size}-{len(list(folder.iterdir()))}"
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_run, args=(Rank(rank, size, shards), meeting, function, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(30)
    failed = [text for ok, text in answers if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def _run(given: Rank, meeting: Path, function: Callable[[Ranks], Any], pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=given.rank, world_size=given.size)
        pipe.send((True, function(Ranks(given.rank, given.size, shards=given.shards))))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
