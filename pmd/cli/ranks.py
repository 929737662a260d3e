"""The processes of a run on several devices: starts them, joins them, and ends them together.

On one machine, `launch` starts one process a device with PyTorch's own launcher, `torchrun`, and waits; on several,
`torchrun` or SLURM starts them. In each, `joined` makes them a process group. If one dies, the launcher stops the rest
of its machine, and on other machines the next collective operation fails; nothing waits for a dead rank.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from pmd.config.processes import STRATEGIES, gathers_in_bfloat16, launcher_of, num_processes
from pmd.errors import RankKilled, RunFailed, RunInterrupted
from pmd.ranks import TIMEOUT, Ranks, is_lost

#: A rank that is told to stop has so long, even if it waits for another one inside a collective operation.
GRACE_S = 10.0
#: A rank that has lost another ends so much later than that one, so that the launcher names the first.
HOLD_S = 3.0
#: Exit codes that say what their own message has said already: bad input, and an interrupt.
EXPLAINED = (2, 130)
PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], trainer: Mapping[str, Any]) -> int:
    """Run `python -m pmd fit ARGUMENTS` once for each device of this machine; return the exit code.

    Raises:
        RunFailed: a rank died; the message names it. The others have ended.
        RankKilled: a signal ended it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    size = num_processes(trainer)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, or every rank would use all cores
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(2 * GRACE_S)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "pmd", "fit", *arguments)
    except SignalException:
        raise RunInterrupted(f"interrupted; all {size} ranks have ended") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in EXPLAINED:
            return failure.exitcode
        code = failure.exitcode
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        when = datetime.fromtimestamp(failure.timestamp).strftime("%H:%M:%S")
        message = (
            f"rank {rank} of {size} (process {failure.pid}) {how} at {when}, so the other ranks were stopped. If "
            "it has saved a checkpoint, continue with --ckpt_path last, on any number of devices."
        )
        raise (RankKilled(message, -code) if code < 0 else RunFailed(message)) from None
    return 0


@contextmanager
def joined(trainer: Mapping[str, Any]) -> Iterator[Ranks | None]:
    """Join the process group of the run's ranks; None if the run has one process that nobody launched as a rank."""
    found = launcher_of(os.environ)
    if trainer.get("strategy") not in STRATEGIES or found is None:
        yield None
        return
    if found[2] == "SLURM":
        _read_slurm()
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    _end_with_launcher()
    if rank > 0:
        _silence()
    on_gpu = trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:  # of the address, or of the network
        raise RunFailed(
            f"rank {rank} of {size} could not meet the others at MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT="
            f"{os.environ['MASTER_PORT']} ({' '.join(str(error).split())[:160]}); on every rank these must name the "
            "machine of rank 0 and a port that is free there."
        ) from error
    try:
        shard_dtype = torch.bfloat16 if gathers_in_bfloat16(trainer) else None
        yield Ranks(rank, size, shards=trainer["strategy"] == "fsdp2", shard_dtype=shard_dtype)
    except BaseException as error:
        if is_lost(error):
            time.sleep(HOLD_S)
        raise
    if dist.is_initialized():  # vLLM, when it is closed, has destroyed it
        dist.destroy_process_group()


def _read_slurm() -> None:
    """Set the variables that torch reads from those of `srun`."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    values = {
        "RANK": slurm.global_rank(), "WORLD_SIZE": slurm.world_size(), "LOCAL_RANK": slurm.local_rank(),
        "GROUP_RANK": slurm.node_rank(), "MASTER_ADDR": slurm.main_address, "MASTER_PORT": slurm.main_port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in values.items()})


def _silence() -> None:
    """Leave the console to rank 0, except for errors, which may be of this rank alone; all warn of the same."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open as long as the process)
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _end_with_launcher() -> None:
    """End when the launcher does, and at most `GRACE_S` after it has asked for that.

    A process that waits inside a collective operation does not run Python's signal handlers; a thread can end it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_after_signal, args=(reading,), name="ends with the launcher", daemon=True).start()


def _end_after_signal(reading: int) -> None:
    while os.read(reading, 1)[0] != signal.SIGTERM:
        continue
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)
