"""Refuses to run as one of several processes: pmd trains on one device, and copies would overwrite each other's
files."""

from collections.abc import Mapping

#: Variables with which launchers say how many processes they have started.
COUNTS = {
    "WORLD_SIZE": "torchrun",
    "SLURM_NTASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
#: SLURM counts tasks for interactive jobs too, in which one shell runs.
INTERACTIVE = ("bash", "interactive")


def process_problems(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable that says that this is one of several processes."""
    problems = []
    for name, launcher in COUNTS.items():
        value = environment.get(name, "").strip()
        if name == "SLURM_NTASKS" and environment.get("SLURM_JOB_NAME") in INTERACTIVE:
            continue
        if value and value != "1":
            problems.append(
                f"{name}={value}: {launcher} has started several processes, and pmd trains in one, on one device; "
                f"start it once, without {launcher} or with one task, or unset {name}."
            )
    return problems
