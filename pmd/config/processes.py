"""How many processes a run has, and who starts them.

With `trainer.strategy: ddp` or `fsdp2`, each device has a process of its own, a rank. On one machine pmd starts them
itself; on several, `torchrun` or SLURM does. Without a strategy, a run that was started several times over is refused:
the copies would overwrite each other's files.
"""

from collections.abc import Iterator, Mapping
from typing import Any

#: Strategies for several devices (`trainer.strategy`).
STRATEGIES = ("ddp", "fsdp2")
#: Precisions (`trainer.precision`) in which layers compute in bfloat16.
MIXED = ("bf16-mixed", "bf16")
#: Variables with which launchers say how many processes they have started.
COUNTS = {
    "WORLD_SIZE": "torchrun",
    "SLURM_NTASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
#: What torchrun says to each process besides their number.
OF_A_RANK = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Launchers whose processes find each other.
KNOWN = ("torchrun", "SLURM")
#: SLURM counts tasks for interactive jobs too, in which one shell runs.
INTERACTIVE = ("bash", "interactive")


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes the run has: devices times nodes with a strategy, else one."""
    if trainer.get("strategy") not in STRATEGIES:
        return 1
    devices, nodes = (_count(trainer, key) for key in ("devices", "num_nodes"))
    return devices * nodes


def gathers_in_bfloat16(trainer: Mapping[str, Any]) -> bool:
    """Whether ranks that divide the weights gather them in bfloat16, whatever their own dtype."""
    return trainer.get("precision") in MIXED


def _count(trainer: Mapping[str, Any], key: str) -> int:
    """Return a number of devices or nodes; Lightning has other ways to say one."""
    value = trainer.get(key, 1)
    return value if isinstance(value, int) else 1


def launcher_of(environment: Mapping[str, str]) -> tuple[str, int, str] | None:
    """Return the variable, the number of processes, and the launcher that has started this one, if one has."""
    for name, launcher in COUNTS.items():
        value = environment.get(name, "").strip()
        if name == "SLURM_NTASKS" and environment.get("SLURM_JOB_NAME") in INTERACTIVE:
            continue
        if value:
            return name, int(value) if value.isdigit() else 0, launcher
    return None


def is_other_rank(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several and not the first, which alone owns the run directory."""
    found = launcher_of(environment)
    rank = environment.get("RANK" if found and found[2] == "torchrun" else "SLURM_PROCID", "0")
    return found is not None and found[1] > 1 and rank != "0"


def starts_ranks(trainer: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether this process is to start the ranks, because no launcher has."""
    found = launcher_of(environment)
    return num_processes(trainer) > 1 and (found is None or found[1] == 1)


def process_problems(environment: Mapping[str, str], trainer: Mapping[str, Any] | None = None) -> list[str]:
    """Return a sentence for each disagreement between the processes that exist and those that the run has.

    Args:
        trainer: the `trainer` section of a run that trains; None for commands that need one process.
    """
    return list(_problems(environment, {} if trainer is None else trainer))


def _problems(environment: Mapping[str, str], trainer: Mapping[str, Any]) -> Iterator[str]:
    wanted, found = num_processes(trainer), launcher_of(environment)
    name, started, launcher = ("", 1, "") if found is None else found
    missing = [variable for variable in OF_A_RANK if not environment.get(variable)]
    if started != 1 and trainer.get("strategy") not in STRATEGIES:
        yield (
            f"{name}={environment[name]}: {launcher} has started several processes, and pmd trains in one, on one "
            f"device; start it once, without {launcher} or with one task, or unset {name}. To train on several "
            "devices, set trainer.strategy=ddp (or fsdp2) and trainer.devices."
        )
    elif started != 1 and launcher not in KNOWN:
        yield f"{name}={environment[name]}: {launcher} cannot start the ranks of a run; use torchrun or SLURM's srun."
    elif launcher == "torchrun" and started == wanted and trainer.get("strategy") in STRATEGIES and missing:
        yield (
            f"{name}={environment[name]} says that torchrun has started this process, but {', '.join(missing)} is not "
            f"set; unset {name}, and pmd starts the ranks of one machine itself, or use torchrun."
        )
    elif started not in (1, wanted):
        yield (
            f"{name}={environment[name]}: {launcher} has started {started} processes, and trainer.devices x "
            f"trainer.num_nodes is {wanted}; make them equal."
        )
    elif started != 1 and launcher == "SLURM" and "SLURM_NTASKS_PER_NODE" not in environment:
        yield (
            f"{name}={environment[name]} does not say how many tasks a node has; give sbatch or srun --nodes and "
            f"--ntasks-per-node={trainer.get('devices', 1)}, not --ntasks."
        )
    elif started == 1 and _count(trainer, "num_nodes") > 1:
        yield (
            f"trainer.num_nodes={trainer['num_nodes']} needs a launcher on every node: torchrun --nnodes="
            f"{trainer['num_nodes']} --nproc-per-node={trainer.get('devices', 1)} --rdzv-backend=c10d --rdzv-endpoint="
            "HOST:PORT -m pmd fit ..., or SLURM's srun."
        )
