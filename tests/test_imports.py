"""Imports point one way: import-linter's contracts in pyproject.toml, and what it cannot see.

It cannot see modules that are named in strings, and a contract lists what is forbidden, where `losses` has a list of
what is allowed. Every check is also shown to find a wrong import that is planted in a copy of the package.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
#: Lowest last. Modules that share a line are independent of each other.
LAYERS = [line.split(" | ") for line in CONTRACTS[0]["layers"]]
MODULE = re.compile(r"pmd(\.\w+)+")
COMMAND = re.compile(r"-m (pmd(?:\.\w+)*)")


def lint(root: Path) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(root), "COLUMNS": "200"},
    )  # fmt: skip


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def layer_of(module: str) -> int:
    part = module.split(".")[1]
    return next(number for number, names in enumerate(LAYERS) if part in names)


def wrong_strings(root: Path) -> list[str]:
    """Say which strings of the package name a module that does not exist, or that its file must not import."""
    wrong = []
    for path in sorted((root / "pmd").rglob("*.py")):
        importer = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for text in strings(path):
            named = {text} if MODULE.fullmatch(text) else set()
            for module in named | {match[1] for match in COMMAND.finditer(text)}:
                if not is_module(root, module):
                    wrong.append(f"{importer} names {module}, which does not exist")
            for module in named:
                own_folder = module.split(".")[1] == importer.split(".")[1]
                if is_module(root, module) and not own_folder and layer_of(module) <= layer_of(importer):
                    wrong.append(f"{importer} names {module}, which lies above it")
    return wrong


def foreign_imports(root: Path) -> list[str]:
    """Say what the losses import beside torch, jaxtyping and the standard library; Triton has a file of its own.

    That file is imported by one other, and that one inside a function: all else works without Triton.
    """
    needs_triton = {"pmd.losses.triton_kernels", "pmd.losses.fused_triton"}
    allowed, foreign = {"torch", "jaxtyping", "__future__", *sys.stdlib_module_names}, []
    for path in sorted((root / "pmd" / "losses").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ".", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                package, is_late = name.split(".")[0], node not in tree.body
                early = name in needs_triton and not is_late and path.name != "fused_triton.py"
                own = path.name == "triton_kernels.py" and package == "triton"
                if early or (package not in allowed and not name.startswith("pmd.losses") and not own):
                    foreign.append(f"{path.name} imports {name}")
    return foreign


def test_the_package_keeps_the_contracts():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_modules_named_in_strings_exist_and_lie_below():
    assert wrong_strings(ROOT) == []


def test_the_losses_need_torch_and_jaxtyping_only():
    assert foreign_imports(ROOT) == []


@pytest.fixture
def copy(tmp_path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
    shutil.copytree(ROOT / "pmd", tmp_path / "pmd", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(root: Path, file: str, line: str) -> None:
    path = root / "pmd" / file
    path.write_text(path.read_text() + f"\n\ndef planted():\n    {line}\n")


def test_planted_imports_break_every_contract(copy):
    assert lint(copy).returncode == 0
    plant(copy, "tasks/splits.py", "import pmd.rollouts.generate")
    plant(copy, "verifiers/sandbox/kernel.py", "import pmd.verifiers.sandbox.pool")
    plant(copy, "losses/reduce.py", "import pmd.errors")
    plant(copy, "memory/store.py", "import torch")
    plant(copy, "config/values.py", "import lightning")
    done = lint(copy)
    assert done.returncode == 1
    broken = {line.strip().removesuffix("BROKEN").strip() for line in done.stdout.splitlines() if "BROKEN" in line}
    assert [c["name"] for c in CONTRACTS if not any(c["name"] in line for line in broken)] == []


def test_planted_strings_are_found(copy):
    plant(copy, "tasks/splits.py", '__import__("pmd.rollouts.generate")')
    plant(copy, "memory/store.py", 'print("python -m pmd.no_such_module")')
    plant(copy, "losses/reduce.py", "import numpy")
    plant(copy, "losses/policy_gradient.py", "import triton")
    (copy / "pmd" / "losses" / "early.py").write_text("from pmd.losses import fused_triton")
    assert wrong_strings(copy) == [
        "pmd.memory.store names pmd.no_such_module, which does not exist",
        "pmd.tasks.splits names pmd.rollouts.generate, which lies above it",
    ]
    assert foreign_imports(copy) == [
        "early.py imports pmd.losses.fused_triton",
        "policy_gradient.py imports triton",
        "reduce.py imports numpy",
    ]
