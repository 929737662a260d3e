"""Trains a small tiny world for many epochs and records what the process holds at the end of each: does it stay flat?

python benchmarks/long_run.py [--epochs 200] [--out FOLDER] [--plot docs/long_run.png]

Per epoch: resident memory, open files, threads, child processes, files in the temporary folder, and the size of the run
directory by part. Prints the first and the last epochs and how much each grew over the second half.
"""

import argparse
import csv
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import small_world  # noqa: E402
from lightning import LightningModule, Trainer  # noqa: E402

from pmd.callbacks.checkpoint import CheckpointCallback  # noqa: E402
from pmd.cli import main as pmd_main  # noqa: E402

CONFIG = [*small_world.CONFIG, "--rollouts.tasks_per_step=3", "--memory.audit_groups=2"]
PARTS = ("checkpoints", "memory", "traces", "metrics.csv")


def watch(log: Path, temporary: Path) -> None:
    """Have every epoch append a row to `log`."""
    end_of_epoch = CheckpointCallback.on_train_epoch_end

    def recording(self: CheckpointCallback, trainer: Trainer, pl_module: LightningModule) -> None:
        end_of_epoch(self, trainer, pl_module)
        row = {"epoch": trainer.current_epoch} | held(self.run_dir.root, temporary)
        is_new = not log.exists()
        with log.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    CheckpointCallback.on_train_epoch_end = recording


def held(run: Path, temporary: Path) -> dict[str, float]:
    """Return what this process and the run hold now; sizes in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sizes = {part: megabytes(run / part) for part in PARTS}
    return {
        "resident memory": int(status["VmRSS"].split()[0]) / 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
        "temporary files": sum(1 for _ in temporary.rglob("*")),
    } | sizes


def megabytes(path: Path) -> float:
    """Return the size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Draw every column over the epochs."""
    import matplotlib.pyplot as plt

    names = [name for name in rows[0] if name != "epoch"]
    figure, axes = plt.subplots(3, 3, figsize=(12, 8), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        axis.plot([int(row["epoch"]) for row in rows], [float(row[name]) for row in rows], linewidth=1)
        axis.set(title=name, xlabel="epoch", ylabel="MB" if name in (*PARTS, "resident memory") else "number")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{len(rows)} epochs of a small tiny world on one core")
    figure.savefig(path, dpi=80)


def main() -> int:
    """Train, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="long_run_"))
    temporary, log = out / "tmp", out / "long_run.csv"
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    watch(log, temporary)
    code = pmd_main(["fit", *CONFIG, f"--trainer.max_epochs={options.epochs}", f"--run_dir={out / 'run'}"])
    if code:
        return code
    rows = list(csv.DictReader(log.open(newline="")))
    middle = rows[len(rows) // 2]
    print(f"{'':18}{'first':>10}{'middle':>10}{'last':>10}{'per epoch':>12}")
    for name in rows[0]:
        first, half, last = (float(row[name]) for row in (rows[0], middle, rows[-1]))
        print(
            f"{name:18}{first:10.2f}{half:10.2f}{last:10.2f}{(last - half) / max(1, len(rows) - len(rows) // 2):12.4f}"
        )
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
