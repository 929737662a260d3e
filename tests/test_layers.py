"""The house rule: data flows down, imports point up. A file imports only from the entries above its own."""

import ast
from pathlib import Path

import pmd

ROOT = Path(pmd.__file__).parent
#: Top to bottom. An entry may import from itself and from those above it.
LAYERS = [
    "errors", "types", "seeds", "config_option", "config_engines", "config_model", "config", "tiny", "sandbox",
    "tasks", "verifiers", "config_load", "config_trainer", "config_check", "prompts", "memory", "teacher",
    "objective", "models", "rollouts", "reflection", "trace", "run_dir", "evaluation", "bootstrap", "module",
    "callbacks", "trainer", "bench", "doctor", "sweep", "commands", "cli", "build", "__main__",
]  # fmt: skip


def layer_of(path: Path) -> int:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return LAYERS.index(part)


def imported_layers(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "pmd" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("pmd.")}
    return found - {"__version__"}


def test_imports_point_up():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        if path == ROOT / "__init__.py":
            continue
        for name in imported_layers(path):
            if LAYERS.index(name) > layer_of(path):
                wrong.append(f"{path.relative_to(ROOT)} imports pmd.{name}, which lies below it")
    assert not wrong, "\n".join(wrong)


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long, f"over 300 lines: {long}"
