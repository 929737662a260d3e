"""Mutation testing of the objective and its inputs: which small code changes does no test notice?

    python benchmarks/mutants.py --count 300 --seed 0 --jobs 2 --out mutants.jsonl

A seeded sample of mutants is drawn from the files in `TESTS` or, with `--of verifiers`, in `VERIFIERS`. Each is written
into a copy of the package, never into the working tree, and the tests named there run against it until one fails. A
mutant that hangs counts as killed. Results are appended to `--out` as they come; running the same command again
continues. Docstrings, annotations, error messages, asserts, imports and decorators are left alone. `MUTANTS.md` has a
verdict on each that survived.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
STEP = "tests/golden/test_training_steps.py::test_a_step_computes_what_was_recorded"
SHORT_STEPS = [f"{STEP}[mix, no dual clip, small micro-batches]", f"{STEP}[pmd, alpha 0.5, top 8 with tail]"]
LONG_STEPS = [
    f"{STEP}[long prompts, both share, small micro-batches]",
    f"{STEP}[long prompts, both share, mix with lora]",
]
#: The files to mutate, and the tests that should notice, fastest first. Missing files are skipped.
TESTS = {
    "pmd/losses/policy_gradient.py": ["tests/losses/test_policy_gradient.py", "tests/losses/test_loss.py"],
    "pmd/losses/reduce.py": ["tests/losses/test_loss.py"],
    "pmd/losses/distillation.py": [
        *("tests/losses/test_loss.py", "tests/losses/test_divergence.py"),
        *("tests/losses/test_implementations.py", "tests/test_scoring.py", *SHORT_STEPS),
    ],
    "pmd/losses/fused.py": [
        *("tests/losses/test_implementations.py", "tests/losses/test_divergence.py"),
        *("tests/test_scoring.py", *SHORT_STEPS),
    ],
    "pmd/scoring.py": [
        *("tests/test_scoring.py", "tests/test_prefixes.py", "tests/memory/test_audit.py"),
        *(*SHORT_STEPS, *LONG_STEPS),
        *("tests/test_module.py", "tests/test_training_step.py"),
    ],
    "pmd/batch.py": [
        *("tests/test_batch.py", "tests/test_prefixes.py", *SHORT_STEPS, *LONG_STEPS, "tests/test_training_step.py"),
    ],
    "pmd/teacher.py": ["tests/test_teacher.py"],
    "pmd/memory/update.py": [
        *("tests/memory/test_update.py", "tests/memory/test_evolve.py", "tests/memory/test_behaviours.py"),
        *("tests/memory/test_judge.py", "tests/memory/test_store.py", "tests/memory/test_reflect.py"),
    ],
}
#: The same for what judges completions; the sandbox has the hostile programs, which take a minute a run.
VERIFIERS = {
    "pmd/verifiers/exact.py": ["tests/verifiers/test_answer_forms.py", "tests/verifiers/test_verifiers.py"],
    "pmd/verifiers/mcq.py": ["tests/verifiers/test_answer_forms.py", "tests/verifiers/test_verifiers.py"],
    "pmd/verifiers/boxes.py": ["tests/verifiers/test_verifiers.py", "tests/tiny/test_tiny_tasks.py"],
    "pmd/verifiers/tool_use.py": ["tests/verifiers/test_tool_use.py", "tests/verifiers/test_answer_forms.py"],
    "pmd/verifiers/code.py": ["tests/verifiers/test_code.py", "tests/verifiers/test_score.py"],
    "pmd/verifiers/pool.py": ["tests/verifiers/test_verifiers.py", "tests/verifiers/test_verification_pool.py"],
    "pmd/tasks/thinking.py": ["tests/tasks/test_thinking.py", "tests/verifiers/test_verifiers.py"],
    **{
        f"pmd/verifiers/mathematics/{name}.py": ["tests/verifiers/test_math.py", "tests/verifiers/test_verifiers.py"]
        for name in ("answers", "compare", "expressions", "extract", "judge", "normalize", "regions", "units", "values")
    },
}
SETS = {"objective": TESTS, "verifiers": VERIFIERS}
MEMORY_LIMIT = 16 * 2**30  # bytes of address space for one test process
MIN_TIMEOUT_S, TIMEOUT_FACTOR = 60.0, 4.0  # a mutant may take this many times what the unchanged code takes


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int  # bytes of the file that `after` replaces
    end: int

    @property
    def key(self) -> str:
        """Identifies the mutant as long as its file is unchanged."""
        content = (ROOT / self.file).read_bytes()
        return hashlib.sha256(f"{self}".encode() + content).hexdigest()[:16]

    def apply(self, source: bytes) -> bytes:
        """Return the file's content with the change."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        short = [" ".join(text.split())[:90] for text in (self.before, self.after)]
        return f"{self.file}:{self.line}  {self.kind}: {short[0]}  ->  {short[1]}"


# ---- What is changed ----

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
#: Methods whose result resembles the object that they are called on.
ELEMENTWISE = {
    "abs", "amax", "clamp", "clamp_min", "clone", "contiguous", "cumsum", "div_", "double", "exp", "exp_", "float",
    "log", "log_softmax", "mul_", "nan_to_num", "neg", "neg_", "roll", "scatter", "square", "sqrt", "sub_", "sum", "to",
}  # fmt: skip


def changed(node: ast.AST, **fields: object) -> ast.AST:
    """Return a copy of the node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def expression_changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (kind, replacement) for one expression."""
    match node:
        case ast.BinOp(left=left, right=right, op=op):
            if type(op) in SWAPS:
                yield "operator", changed(node, op=SWAPS[type(op)]())
            yield "left operand only", left
            yield "right operand only", right
        case ast.BoolOp(op=op, values=values):
            yield "and/or", changed(node, op=SWAPS[type(op)]())
            yield "first condition only", values[0]
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "comparison", changed(node, ops=[SWAPS[type(op)]()])
        case ast.UnaryOp(operand=operand):
            yield {ast.Not: "removed not", ast.Invert: "removed ~"}.get(type(node.op), "removed sign"), operand
        case ast.IfExp(body=body, orelse=orelse):
            yield "swapped branches", changed(node, body=orelse, orelse=body)
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(value * 2 if value else 1.0)
        case ast.Call():
            yield from call_changes(node)
        case ast.Slice(lower=lower, upper=upper):
            for name, bound in (("lower", lower), ("upper", upper)):
                if bound is not None:
                    yield "slice off by one", changed(node, **{name: ast.BinOp(bound, ast.Add(), ast.Constant(1))})


def call_changes(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    """Yield the changes of a call."""
    if isinstance(node.func, ast.Attribute) and not is_module(node.func.value):
        if node.func.attr == "detach":
            yield "removed detach", node.func.value
        elif node.func.attr in ELEMENTWISE:
            yield "unchanged operand", node.func.value
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "strict"):  # lengths that never differ
            yield "removed keyword", changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    is_cast = isinstance(node.func, ast.Name) and node.func.id in ("cast", "isinstance", "getattr", "hasattr")
    if not is_cast:
        for i in range(len(node.args) - 1):
            first, second = node.args[i : i + 2]
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                yield "swapped arguments", changed(node, args=[*node.args[:i], second, first, *node.args[i + 2 :]])


def is_module(node: ast.AST) -> bool:
    """Whether a name is a module, so that a call on it is not a method call."""
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "np", "ast", "json")


def statement_can_go(node: ast.AST) -> bool:
    """Whether a statement can be deleted without leaving an unknown name behind."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return False  # a docstring
        case ast.Expr(value=ast.Yield() | ast.YieldFrom()):
            return False  # without it, the function may no longer be a generator
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.If(orelse=[]) | ast.Continue() | ast.Break():
            return True
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return True
    return False


def mutable_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that may be changed: no annotations, messages, asserts, imports, decorators or types."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr
            ):
                continue
            if isinstance(child, ast.Assign) and is_type_alias_or_slots(child):
                continue
            yield child
            if not isinstance(child, ast.Raise):
                yield from mutable_nodes(child)


def is_type_alias_or_slots(node: ast.Assign) -> bool:
    """Whether an assignment names a type (`Pair = tuple[...]`) or slots."""
    name = node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""
    return name == "__slots__" or (name[:1].isupper() and not name.isupper())


def all_mutants(file: str) -> list[Mutant]:
    """Return every mutant of a file, once each."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[bytes, Mutant] = {}
    for node in mutable_nodes(ast.parse(source)):
        if not isinstance(node, ast.expr | ast.stmt) and not isinstance(node, ast.Slice):
            continue
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        for kind, after in changes_of(node):
            mutant = Mutant(file, node.lineno, kind, source[start:end].decode(), after, start, end)
            mutated = mutant.apply(source)
            if mutated not in found:
                found[mutated] = mutant
    return list(found.values())


def changes_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (kind, new source) for a node; an expression is put in parentheses, so that it stays one."""
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield "operator", ast.unparse(changed(node, op=SWAPS[type(node.op)]()))
    if isinstance(node, ast.stmt):
        if statement_can_go(node):
            yield "deleted statement", "pass"
        return
    for kind, new in expression_changes(node):
        text = ast.unparse(ast.fix_missing_locations(new))
        yield kind, text if isinstance(new, ast.Slice | ast.Constant | ast.Name) else f"({text})"


def compiles(source: bytes) -> bool:
    """Whether the source is valid Python."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def draw_sample(count: int, seed: int, only: str, of: str = "objective") -> list[Mutant]:
    """Return `count` mutants of all files of a set together, the same for the same seed and sources."""
    files = [file for file in SETS[of] if (ROOT / file).is_file() and only in file]
    mutants = [mutant for file in files for mutant in all_mutants(file)]
    Random(seed).shuffle(mutants)
    valid = (mutant for mutant in mutants if compiles(mutant.apply((ROOT / mutant.file).read_bytes())))
    return list(islice(valid, count))


# ---- Running the tests ----


def tests_of(file: str) -> list[str]:
    """Return the tests of a file that exist."""
    return [test for test in (TESTS | VERIFIERS)[file] if (ROOT / test.split("::")[0]).is_file()]


def import_what_is_slow() -> None:
    """Import third-party packages once, because every test process is forked from this one; pmd is not imported."""
    import bitsandbytes  # noqa: F401
    import hypothesis  # noqa: F401
    import jaxtyping  # noqa: F401
    import lightning  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    assert "pmd" not in sys.modules


def copy_package(folder: Path, mutant: Mutant | None) -> None:
    """Link the package into `folder`, with the mutated file in place of its own."""
    shutil.copytree(ROOT / "pmd", folder / "pmd", copy_function=link_or_copy)
    if mutant is not None:
        path = folder / mutant.file
        source = path.read_bytes()
        path.unlink()
        path.write_bytes(mutant.apply(source))
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()


def link_or_copy(source: str, destination: str) -> None:
    """Make a hard link, or a copy where the file systems differ."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


@dataclass
class Process:
    """A running test process."""

    mutant: Mutant | None  # None: the unchanged package
    folder: Path
    pid: int
    started: float
    timeout_s: float


def start(mutant: Mutant | None, tests: Sequence[str], timeout_s: float) -> Process:
    """Fork a process that runs the tests against a copy of the package."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    copy_package(folder, mutant)
    pid = os.fork()
    if pid == 0:
        os._exit(run_tests(folder, tests))
    return Process(mutant, folder, pid, time.monotonic(), timeout_s)


def run_tests(folder: Path, tests: Sequence[str]) -> int:
    """Run pytest in this process, in its own process group; return the exit code."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    own = {"", str(ROOT), str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in own)]
    os.environ |= {"PYTHONPATH": str(folder), "TMPDIR": str(folder)}
    os.chdir(ROOT)
    import pytest

    import pmd

    assert pmd.__file__ is not None
    assert pmd.__file__.startswith(str(folder)), pmd.__file__
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    code = int(pytest.main([*options, f"--rootdir={ROOT}", f"--basetemp={folder / 'tmp'}", *tests]))
    sys.stdout.flush()
    return code


def finished(process: Process) -> tuple[str, str, float, float] | None:
    """Return (verdict, by what, seconds, CPU seconds) if the process has ended or timed out; delete its copy."""
    seconds = time.monotonic() - process.started
    pid, status, used = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        if seconds < process.timeout_s:
            return None
        os.killpg(process.pid, signal.SIGKILL)
        _, _, used = os.wait4(process.pid, 0)
        verdict, by = "killed", f"timeout of {process.timeout_s:.0f} s"
    else:
        code = os.waitstatus_to_exitcode(status)
        failed = [line for line in read_log(process.folder) if line.startswith(("FAILED", "ERROR"))]
        by = failed[0].split(" ", 1)[1].split(" - ")[0] if failed else f"exit code {code}"
        verdict = "survived" if code == 0 else "killed"
        if code in (4, 5):
            raise SystemExit(f"pytest could not run the tests: {read_log(process.folder)[-5:]}")
    shutil.rmtree(process.folder, ignore_errors=True)
    return verdict, by if verdict == "killed" else "", seconds, used.ru_utime + used.ru_stime


def read_log(folder: Path) -> list[str]:
    """Return what the tests printed."""
    return (folder / "log").read_text(errors="replace").splitlines()


def time_unchanged(file: str) -> float:
    """Return the seconds that a file's tests take on the unchanged package, on which they must pass."""
    process = start(None, tests_of(file), 3600.0)
    while (result := finished(process)) is None:
        time.sleep(0.1)
    if result[0] == "killed":
        raise SystemExit(f"the tests of {file} fail on the unchanged package: {result[1]}")
    return result[2]


def run_all(mutants: Sequence[Mutant], jobs: int, out: Path) -> None:
    """Test the mutants, `jobs` at once, and append a line for each to `out`."""
    import_what_is_slow()
    timeouts: dict[str, float] = {}
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        seconds = time_unchanged(file)
        timeouts[file] = max(MIN_TIMEOUT_S, TIMEOUT_FACTOR * jobs * seconds)
        print(f"{file}: its tests take {seconds:.0f} s on the unchanged package", flush=True)
    waiting, running, done = list(mutants), list[Process](), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            running.append(start(mutant, tests_of(mutant.file), timeouts[mutant.file]))
        time.sleep(0.05)
        for process in list(running):
            if (result := finished(process)) is None:
                continue
            running.remove(process)
            done += 1
            assert process.mutant is not None
            verdict, by, seconds, cpu_seconds = result
            record = {"key": process.mutant.key, "verdict": verdict, "by": by, "seconds": round(seconds, 1)}
            record |= {"cpu_seconds": round(cpu_seconds, 1)}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record | asdict(process.mutant)) + "\n")
            print(f"[{done}/{len(mutants)}] {verdict:8} {seconds:5.1f} s  {process.mutant}  {by}", flush=True)


def read_results(out: Path) -> dict[str, str]:
    """Return the latest verdict by key."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    return {record["key"]: record["verdict"] for record in map(json.loads, lines)}


def report(mutants: Sequence[Mutant], results: dict[str, str]) -> None:
    """Print how many of each file's mutants were killed, and list the others."""
    counts = Counter((mutant.file, results.get(mutant.key, "not run")) for mutant in mutants)
    print(f"\n{'file':34} killed survived not run")
    for file in sorted({mutant.file for mutant in mutants}):
        print(f"{file:34} {counts[file, 'killed']:6} {counts[file, 'survived']:8} {counts[file, 'not run']:7}")
    survivors = [mutant for mutant in mutants if results.get(mutant.key) == "survived"]
    killed = sum(count for (_, verdict), count in counts.items() if verdict == "killed")
    print(f"{'all':34} {killed:6} {len(survivors):8} {len(mutants) - killed - len(survivors):7}")
    for mutant in sorted(survivors, key=lambda m: (m.file, m.line)):
        print(f"survived: {mutant}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="test processes at once, one thread each")
    parser.add_argument("--of", choices=list(SETS), default="objective", help="what is mutated")
    parser.add_argument("--only", default="", help="mutate only files whose path contains this")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="results, a JSON line each")
    parser.add_argument("--list-only", action="store_true", help="print the sample and its results so far")
    parser.add_argument("--retry-survivors", action="store_true", help="test the survivors again")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    mutants, results = (
        draw_sample(arguments.count, arguments.seed, arguments.only, arguments.of),
        read_results(arguments.out),
    )
    settled = {"killed"} if arguments.retry_survivors else {"killed", "survived"}
    if arguments.list_only:
        for mutant in mutants:
            print(f"{results.get(mutant.key, 'not run'):8} {mutant}")
        return
    run_all([mutant for mutant in mutants if results.get(mutant.key) not in settled], arguments.jobs, arguments.out)
    report(mutants, read_results(arguments.out))


if __name__ == "__main__":
    main()
