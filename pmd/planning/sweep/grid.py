"""Reads a grid file and plans its runs; each is checked like a single `fit`.

    base: configs/tiny.yaml            # a complete run
    seeds: [0, 1, 2]
    reference: PMD                     # an arm of every block, with which the others are compared seed by seed
    settings: {trace_every: 0}         # for every run; keys as on the command line
    blocks:                            # sections of the table
      - title: G=2
        settings: {rollouts.group_size: 2}
        arms:                          # rows: each arm is run with every seed
          GRPO: {overlays: [configs/methods/tiny/grpo.yaml]}
          PMD: {settings: {memory.k: 4}, axes: {optimizer.lr: [0.003, 0.006]}}   # one row per choice

An arm with `test: true` is evaluated without training; with `memory: RUN` it sees the memory of that run in its prompt
(`{seed}` in RUN stands for the arm's own seed).
A block may name a base of its own, and overlays that follow those of its arms. Later settings win: base, overlays of
the arm, overlays of the block, the settings of grid, block and arm, the choice on the axes, the seed.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pmd.config.check import check_config
from pmd.config.load import LoadedConfig, load_config
from pmd.config.processes import num_processes
from pmd.config.save import resolved_values
from pmd.config.values import build_section
from pmd.errors import ConfigError
from pmd.run_dir import RunDir
from pmd.tasks import describe_task_problems


@dataclass
class Arm:
    """One row of the table, or one row per combination of its axes."""

    overlays: list[str] = field(default_factory=list)
    test: bool = False  # evaluate the untrained policy, instead of training it
    memory: str = ""  # of another run, whose name may hold {seed}: evaluate the untrained policy with it in the prompt
    settings: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Block:
    """Rows to compare with each other."""

    title: str = ""
    base: str = ""  # instead of the grid's
    overlays: list[str] = field(default_factory=list)  # after those of the arms: data sets, after methods
    settings: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Any] = field(default_factory=dict)


@dataclass
class GridFile:
    """The content of a grid file."""

    base: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    reference: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    blocks: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One `fit` of the grid, or one `test`."""

    block: str
    arm: str
    choices: tuple[tuple[str, Any], ...]  # (key, value) on each axis
    seed: int
    arguments: tuple[str, ...]  # of the command, without run_dir and ckpt_path
    run_dir: Path
    config: str  # resolved, as the run will save it, except for run_dir and ckpt_path
    command: str = "fit"  # or `test`
    tested: str = ""  # `test` writes to this folder of run_dir

    @property
    def results(self) -> Path:
        """The file that marks the run as finished."""
        return RunDir(self.run_dir / self.tested).results

    @property
    def num_processes(self) -> int:
        """How many processes train it, each on a device of its own."""
        return num_processes(json.loads(self.config)["trainer"]) if self.command == "fit" else 1

    @property
    def num_gpus(self) -> int:
        """How many GPUs it needs: one for each process, unless its configuration asks for the CPU."""
        on_cpu = json.loads(self.config)["trainer"].get("accelerator") == "cpu"
        return 0 if on_cpu else self.num_processes


def plan(file: Path, out: Path, *, for_here: bool = True) -> list[PlannedRun]:
    """Read the grid and check each of its runs; their directories are placed under `out`.

    Args:
        for_here: also check what this machine must have: devices, packages, data.

    Raises:
        ConfigError: lists all problems of the grid and of its runs' configurations.
    """
    grid, blocks = read_grid(file)
    runs: list[PlannedRun] = []
    problems: dict[str, None] = {}  # in order, each once
    for block, arms in blocks:
        for name, arm in arms.items():
            for values in itertools.product(*arm.axes.values()):
                choices = tuple(zip(arm.axes, values, strict=True))
                for seed in grid.seeds:
                    try:
                        run, loaded = _plan_run(grid, block, (name, arm), choices, seed, out)
                        if for_here:
                            check_config(loaded, describe_task_problems(loaded.run))
                        elif loaded.problems:
                            raise ConfigError(loaded.problems)
                        runs.append(run)
                    except ConfigError as error:
                        place = ", ".join(filter(None, (block.title, row_label(name, choices))))
                        problems |= dict.fromkeys(f"{place}: {problem}" for problem in error.problems)
    if len({run.run_dir for run in runs}) < len(runs):
        problems["two rows of the grid have the same block, arm and choices; name them differently."] = None
    if problems:
        raise ConfigError(list(problems))
    return runs


def read_grid(file: Path) -> tuple[GridFile, list[tuple[Block, dict[str, Arm]]]]:
    """Read a grid file without reading the configurations that it names.

    Raises:
        ConfigError: lists all problems of the file.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"grid={file} does not exist; there are grids in ablations/grids/.") from None
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid={file} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"grid={file} must be a mapping with base, seeds and blocks.")
    grid, problems = build_section(GridFile, _text_keys(plain), "")
    if not grid.base:
        problems.append("base is missing; name a complete configuration, such as configs/tiny.yaml.")
    if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds):
        problems.append(f"seeds={grid.seeds} must be one or more distinct whole numbers.")
    blocks = []
    for number, value in enumerate(grid.blocks):
        block, wrong = _section(Block, value, f"blocks[{number}]")
        arms: dict[str, Arm] = {}
        for name, content in block.arms.items():
            arms[name], wrong_arm = _section(Arm, content or {}, f"blocks[{number}].arms.{name}")
            wrong += wrong_arm
            empty = [key for key, values in arms[name].axes.items() if not values]
            wrong += [f"blocks[{number}].arms.{name}.axes.{key}=[] must not be empty." for key in empty]
        if grid.reference and (grid.reference not in arms or arms[grid.reference].axes):
            wrong.append(
                f"blocks[{number}] has no arm {grid.reference!r} without axes, the grid's reference; add it, or change "
                "reference."
            )
        if not arms:
            wrong.append(f"blocks[{number}].arms is empty; name at least one arm.")
        problems += wrong
        blocks.append((block, arms))
    if not blocks:
        problems.append("blocks is empty; name at least one block with arms.")
    if problems:
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    return grid, blocks


def row_label(arm: str, choices: Sequence[tuple[str, Any]]) -> str:
    """Return the name of a row: its arm, and its choices with the last part of their keys."""
    named = [f"{key.rpartition('.')[2]}={'null' if value is None else value}" for key, value in choices]
    return f"{arm} ({', '.join(named)})" if named else arm


def _plan_run(
    grid: GridFile,
    block: Block,
    named_arm: tuple[str, Arm],
    choices: tuple[tuple[str, Any], ...],
    seed: int,
    out: Path,
) -> tuple[PlannedRun, LoadedConfig]:
    name, arm = named_arm
    settings = grid.settings | block.settings | arm.settings | dict(choices) | {"method": name, "seed_everything": seed}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    files = [block.base or grid.base, *arm.overlays, *block.overlays]
    loaded = load_config(files, overrides)
    if loaded.run.wandb.mode != "off" and loaded.run.wandb.group is None:  # a sweep is a group there
        overrides.append(f"wandb.group={json.dumps(out.name)}")
        loaded = load_config(files, overrides)
    parts = [block.title, name, *(f"{key}-{value}" for key, value in choices), f"seed-{seed}"]
    is_test = arm.test or bool(arm.memory)
    tested = "test-initial" + (f"-memory-k{loaded.run.memory.k}" if arm.memory else "") if is_test else ""
    memory = (f"--memory={arm.memory.replace('{seed}', str(seed))}",) if arm.memory else ()
    run = PlannedRun(
        block=block.title,
        arm=name,
        choices=choices,
        seed=seed,
        arguments=(*(f"--config={file}" for file in files), *(f"--{override}" for override in overrides), *memory),
        run_dir=out.joinpath(*(_slug(part) for part in parts if part)),
        config=json.dumps(resolved_values(loaded), sort_keys=True),
        command="test" if is_test else "fit",
        tested=tested,
    )
    return run, loaded


def _section(kind: type, value: Any, prefix: str) -> tuple[Any, list[str]]:
    if not isinstance(value, dict):
        return kind(), [f"{prefix}={value!r} must be a mapping."]
    section, problems = build_section(kind, _text_keys(value), f"{prefix}.")
    return section, problems


def _text_keys(value: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()}


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", text).strip("_")
