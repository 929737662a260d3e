"""The ranks of a run on several devices: one process each, and what they tell each other.

Every rank runs the same program on the same batches and takes the same decisions. Two things are shared out, in whole
groups: who generates and verifies which rollouts, and whose micro-batches hold which. Sums are over all ranks, so
nothing depends on their number but rounding. What only rank 0 has (the memory, the run directory), it tells the others.

Gradients are summed once per optimizer step. Between two sums a rank may have any number of micro-batches, even none.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pmd.errors import AlignmentError, RankLost

T = TypeVar("T")
#: A rank that has waited so long for the others has lost one: no step, evaluation or reflection takes as long.
TIMEOUT = timedelta(hours=4)
#: Gradients are summed in pieces of this size, so that the copies need little memory.
BUCKET_BYTES = 256 << 20
#: What backends say when the process at the other end has gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL error")


class Ranks:
    """One process's view of all of them: its number, how many there are, and their collective operations."""

    def __init__(self, rank: int, size: int, *, shards: bool = False, shard_dtype: torch.dtype | None = None):
        """Describe the ranks of an initialised process group.

        Args:
            shards: the ranks divide the weights (sharding.py); else each holds all.
            shard_dtype: the dtype in which divided weights are gathered; None is their own.
        """
        self.rank, self.size = rank, size
        self.shards, self.shard_dtype = shards, shard_dtype
        self.num_generating = size  # the first so many ranks have an engine
        self.objects: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)  # pickles stay on the host
        self._lock = threading.Lock()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which owns the memory and the run directory."""
        return self.rank == 0

    @property
    def generates(self) -> bool:
        """Whether this rank has an engine that generates."""
        return self.rank < self.num_generating

    def mesh(self) -> DeviceMesh:
        """Return the devices of all ranks."""
        return init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (self.size,))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return what this rank generates: every n-th item. `gathered` puts the results back in order."""
        return items[self.rank :: self.num_generating] if self.generates else items[:0]

    def gathered(self, results: Sequence[T]) -> list[T]:
        """Return the results of all ranks for the items that `share` gave each of them, in the order of the items."""
        parts = self.all(list(results))[: self.num_generating]
        whole: list[T] = []
        for position in range(sum(map(len, parts))):
            whole.append(parts[position % len(parts)][position // len(parts)])
        return whole

    def all(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        values: list[Any] = [None] * self.size
        with self._together("gathering"):
            dist.all_gather_object(values, value, group=self.objects)
        return values

    def from_first(self, compute: Callable[[], T]) -> T:
        """Return on every rank what `compute` returns on rank 0, the only one that calls it.

        Raises:
            RankLost: on the other ranks, if it raises on rank 0.
        """
        message: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                message = [compute(), None]
            except Exception as raised:
                error, message = raised, [None, f"{type(raised).__name__}: {raised}"]
        with self._together("waiting for rank 0"):
            dist.broadcast_object_list(message, 0, group=self.objects)
        if error is not None:
            raise error
        if message[1] is not None:
            raise RankLost(f"rank {self.rank} of {self.size} stops, because rank 0 has failed: {message[1]}")
        return message[0]

    def summed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the sum of each named value; a rank may lack some."""
        total: dict[str, float] = {}
        for own in self.all(dict(values)):
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks; one that no rank has stays None, for the optimizer."""
        parameters = list(parameters)
        if not parameters:
            return
        device = parameters[0].device
        exists = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
        with self._together("summing gradients"):
            dist.all_reduce(exists, dist.ReduceOp.MAX)
            used = [p for p, found in zip(parameters, exists.tolist(), strict=True) if found]
            for parameter in used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for bucket in _buckets([p.grad for p in used if p.grad is not None]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat)
                for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    @torch.no_grad()
    def check_equal(self, parameters: Iterable[Tensor], what: str) -> None:
        """Check that all ranks hold the same numbers.

        Raises:
            AlignmentError: they do not.
        """
        own = [(p.double().sum().item(), p.double().abs().sum().item()) for p in parameters]
        others = self.all(own)
        different = [rank for rank, found in enumerate(others) if found != others[0]]
        if different:
            raise AlignmentError(
                f"{what} differ between rank 0 and rank {different[0]}: the ranks have loaded different files; give "
                "all of them the same model.path, ckpt_path and code."
            )

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Enter a collective operation, in one thread at a time."""
        if not self._lock.acquire(blocking=False):
            raise AlignmentError(f"rank {self.rank}: {what} began in two threads at once.")
        try:
            with self.naming_loss(what):
                yield
        finally:
            self._lock.release()

    @contextmanager
    def naming_loss(self, what: str) -> Iterator[None]:
        """Say in words that another rank has gone, when a collective operation fails because of it."""
        started = time.monotonic()
        try:
            yield
        except RankLost:
            raise
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if isinstance(error, dist.DistError) or any(sign in text for sign in LOST) or "imed out" in text:
                waited = time.monotonic() - started
                raise RankLost(
                    f"rank {self.rank} of {self.size} was {what} for {waited:.0f} s and has lost another rank, which "
                    f"has ended or hangs; what ended it is in its own output ({text[:160]})."
                ) from error
            raise


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide gradients into runs of one type and of at most `BUCKET_BYTES`; a larger one has its own."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        num_bytes = gradient.numel() * gradient.element_size()
        if bucket and (gradient.dtype != bucket[0].dtype or size + num_bytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += num_bytes
    if bucket:
        yield bucket


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that another rank has gone."""
    while error is not None and not isinstance(error, RankLost):
        error = error.__cause__ or error.__context__
    return error is not None
