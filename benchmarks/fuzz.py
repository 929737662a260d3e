"""Fuzzes what comes in at the door: configurations, in process and through the command line, and lines of task files.

    python benchmarks/fuzz.py [--configs 10000] [--commands 100] [--lines 5000] [--fits 0] [--seed 0]

Each kind prints its seed, how many inputs were refused and accepted, and every surprise: a traceback, a hang, something
senseless that was accepted. The exit code is 1 if there was one. A kind is a function of `KINDS` that yields surprises.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from pmd.config.check import check_config
from pmd.config.load import load_config
from pmd.config.save import resolved_values, saved_yaml
from pmd.config.schema import DataConfig, RunConfig
from pmd.config.values import all_keys
from pmd.errors import ConfigError
from pmd.run_dir import describe_run_dir_problems
from pmd.tasks import describe_data_problems
from pmd.tasks.jsonl import read_task_file
from pmd.types import Task
from pmd.verifiers.pool import verify

ROOT = Path(__file__).parents[1]
HANG_S = 2  # of computing, for one input in process
KEYS = list(all_keys(RunConfig))
SECTIONS = [*sorted({key.rpartition(".")[0] for key in KEYS} - {""}), "trainer"]
TRAINER_KEYS = ["max_epochs", "max_steps", "max_time", "precision", "accelerator", "log_every_n_steps", "profiler",
                "deterministic", "devices", "min_epochs", "callbacks", "model_registry", "nonsense"]  # fmt: skip
TEXTS = [
    "", " ", "x", "tiny", "tiny_exam", "null", "off", "[red]", "[/red]", "[bold]x[/]", "a/b", "../..", "/", "~", "é",
    "\0", "\x1b[31m", "\ud83d", "\udc80", "\U0001f600", "x" * 300, "y" * 5000, "a/" * 3000, "$x^", "${", "${no.such}",
    "${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${seed_everything}", "${memory}", "${method}", "\\${x}", "%s {}",
    "http://[", "http://host:99999", "hf://x", "CON", "last", "best", "symmetric", "2025-02-30", "99:99:99:99",
    "999999999999:0:0:0", "\u0661:\u0660:0:0",
    "configs/tiny.yaml", "/dev/zero", "/dev/null", "/proc/self/mem", "os.system",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(10**400), 10**5000, 0.0, -0.0, 0.5, 0.9,
    0.999, 1.0, 1.5, 1e-9, 1e-300, 5e-324, 1e9, 1e300, math.inf, -math.inf, math.nan, 1e-7, 100, 1000, 65536, 10**6,
    10**7, 10**9,
]  # fmt: skip


class Hang(Exception):
    """An input took too long."""


class Deadline:
    """Raises `Hang` in the block after `HANG_S` seconds of computing, or after a minute of waiting."""

    def __enter__(self) -> None:
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, self._stop)
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        signal.alarm(60)

    def __exit__(self, *_: object) -> None:
        stop_clocks()

    def _stop(self, *_: object) -> None:
        raise Hang(f"more than {HANG_S} s")


def stop_clocks() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)


def deep(levels: int, of: type) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if of is list else {"a": value}
    return value


def any_value(draw: random.Random) -> Any:
    """Return a plain value, sensible or not."""
    match draw.randrange(10):
        case 0 | 1:
            return draw.choice(TEXTS)
        case 2 | 3 | 4:
            return draw.choice(NUMBERS)
        case 5:
            return draw.choice([True, False, None])
        case 6:
            return [any_value(draw) for _ in range(draw.choice([0, 1, 2, 3]))]
        case 7:
            return {any_key(draw): any_value(draw) for _ in range(draw.choice([0, 1, 2]))}
        case 8:
            return deep(draw.choice([1, 5, 25, 200, 2000]), draw.choice([list, dict]))
        case _:
            return draw.uniform(-2, 2) * 10 ** draw.randrange(-9, 9)


def any_key(draw: random.Random) -> Any:
    last = draw.choice(KEYS).split(".")
    return draw.choice([draw.choice(last), draw.choice(TEXTS), 1, None, True, 1.5, "path", "k", "lr"])


def sensible_value(draw: random.Random, key: str) -> Any:
    """Return a value of the key's type, often near its bounds."""
    section: Any = RunConfig
    *parents, name = key.split(".")
    for parent in parents:
        section = typing.get_type_hints(section)[parent]
    field = next(f for f in dataclasses.fields(section) if f.name == name)
    hint = typing.get_type_hints(section)[name]
    options = [*typing.get_args(hint)] or [hint]
    bounds = [v for k, v in field.metadata.items() if k in ("minimum", "above", "maximum", "below")]
    if options and bounds and draw.random() < 0.8:
        bound = draw.choice(bounds)
        return draw.choice([bound, bound + 1, bound - 1, bound * 2, bound / 2, bound * (1 - 1e-12), int(bound)])
    option = draw.choice(options)
    if option is bool or typing.get_args(hint) == (True, False):
        return draw.choice([True, False])
    if isinstance(option, str | int | float):
        return option
    return any_value(draw)


def set_at(plain: dict, key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        inner = plain.get(parent)
        if not isinstance(inner, dict):
            inner = plain[parent] = {}
        plain = inner
    plain[name] = value


def mutated_config(draw: random.Random, base: dict) -> dict:
    plain = copy.deepcopy(base)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 6])):
        match draw.randrange(8):
            case 0 | 1 | 2:
                key = draw.choice(KEYS)
                set_at(plain, key, sensible_value(draw, key))
            case 3 | 4:
                set_at(plain, draw.choice(KEYS), any_value(draw))
            case 5:
                set_at(plain, draw.choice(SECTIONS), any_value(draw))
            case 6:
                set_at(plain, f"trainer.{draw.choice(TRAINER_KEYS)}", any_value(draw))
            case _:
                plain[any_key(draw)] = any_value(draw)
    return plain


def yaml_text(draw: random.Random, plain: dict) -> str:
    """Return YAML of a configuration, sometimes damaged or of a hostile form."""
    try:
        text = yaml.dump(plain, allow_unicode=True, Dumper=getattr(yaml, "CDumper", yaml.Dumper))
    except (RecursionError, ValueError):  # too deep, or a number too long to write
        text = f"memory: {'[' * 3000}"
    match draw.randrange(30):
        case 0:
            cut = draw.randrange(len(text))
            return (
                text[:cut]
                + draw.choice(["{", "[", "\t", "\0", "*a", "&a", "!!python/object:x", ": :", "\ufeff"])
                + text[cut:]
            )
        case 1:
            return text[: draw.randrange(len(text))]
        case 2:
            lines = "\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12))
            return f"x0: &x0 [1, 1]\n{lines}\n"
        case 3:
            return "a: &a\n  b: *a\n"
        case 4:
            return "data: " + "{a: " * 5000 + "1" + "}" * 5000
        case 5:
            return f"seed_everything: {'9' * draw.choice([30, 5000, 100_000])}\n"
        case 6:
            return f"memory: ${{{'a' * 1000}}}\nmethod: {'${' * 200}x{'}' * 200}\n"
    return text


def senseless(values: dict[str, Any], at: str = "") -> Iterator[str]:
    """Yield what no accepted configuration may hold."""
    for key, value in values.items():
        place = f"{at}.{key}" if at else str(key)
        if isinstance(value, dict):
            yield from senseless(value, place)
            continue
        for one in value if isinstance(value, list) else [value]:
            is_bad_number = isinstance(one, int | float) and not abs(one) <= 2**45  # or not a number
            is_bad_text = isinstance(one, str) and (not one.isprintable() or not one or len(one) > 4096)
            if is_bad_number or is_bad_text:
                yield f"{place}={one!r}"
    if at == "optimizer" and not (values["lr"] <= 1 and values["beta1"] < 1 and values["beta2"] < 1):
        yield f"optimizer={values}"


def accepts(file: Path) -> bool:
    """Whether `fit` would start with this configuration; raises whatever it raises besides ConfigError."""
    try:
        loaded = load_config([file])
        found = describe_run_dir_problems("fit", loaded.run, loaded.folder, loaded.name)
        check_config(loaded, [*found, *describe_data_problems(loaded.run.data)])
    except ConfigError as error:
        str(error).encode("utf-8")
        return False
    wrong = list(senseless(resolved_values(loaded)))
    if wrong:
        raise AssertionError(f"accepted: {wrong}")
    saved = file.with_name("saved.yaml")
    saved.write_text(saved_yaml(loaded), encoding="utf-8")
    again = load_config([saved])
    if again.problems or dataclasses.replace(again.run, run_dir=None, ckpt_path=None) != dataclasses.replace(
        loaded.run,
        run_dir=None,
        ckpt_path=None,
        **{k: getattr(again.run, k) for k in ("model", "data", "memory", "rollouts")},
    ):
        raise AssertionError(f"the saved configuration differs: {again.problems}")
    return True


def bases() -> list[dict]:
    files = [
        ROOT / "configs" / "tiny.yaml",
        ROOT / "configs" / "qwen3_8b.yaml",
        ROOT / "configs" / "tiny_sciknoweval.yaml",
    ]
    return [typing.cast(dict, OmegaConf.to_container(OmegaConf.load(file))) for file in files]


def tried(call: Callable[[], bool], counts: Counter, what: Callable[[], str]) -> Iterator[str]:
    """Count one input as accepted or refused; yield it if anything else happened."""
    try:
        with Deadline():
            counts["accepted" if call() else "refused"] += 1
    except Exception as error:
        counts["surprises"] += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        yield f"{type(error).__name__}: {str(error)[:300]} at {last.filename}:{last.lineno} for {what()[:500]}"


def fuzz_configs(number: int, seed: int, folder: Path, counts: Counter) -> Iterator[str]:
    """Load and check mutated configurations in this process."""
    draw, file = random.Random(seed), folder / "run.yaml"
    starts = bases()
    for _ in range(number):
        text = yaml_text(draw, mutated_config(draw, draw.choice(starts[:1] * 3 + starts)))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        yield from tried(lambda: accepts(file), counts, lambda text=text: text)


def fuzz_commands(number: int, seed: int, folder: Path, counts: Counter) -> Iterator[str]:
    """Give mutated configurations and overrides to `pmd fit --print_config`, each in a process of its own."""
    draw, file = random.Random(seed), folder / "run.yaml"
    for _ in range(number):
        file.write_bytes(yaml_text(draw, mutated_config(draw, bases()[0])).encode("utf-8", "surrogatepass"))
        arguments = [f"--config={file}"]
        for _ in range(draw.choice([0, 1, 2])):
            value = draw.choice(TEXTS)
            with contextlib.suppress(RecursionError, ValueError):  # no argument can be so deep or so long
                value = draw.choice([str(any_value(draw))[:200], value])
            value = value.replace("\0", "")
            argument = f"--{draw.choice([*KEYS, 'a..b', 'x[0]', ''])}={value}"
            arguments.append(argument.encode(errors="surrogatepass").decode(errors="replace"))
        shown = f"{arguments} with {file.read_bytes()[:400]!r}"
        yield from tried(lambda a=arguments: _command_accepts(a), counts, lambda shown=shown: shown)


def _command_accepts(arguments: list[str]) -> bool:
    done = _run("fit", "--print_config", *arguments)
    in_words = done.returncode == 0 or (done.returncode == 2 and done.stderr.startswith("ConfigError"))
    if not in_words or "Traceback" in done.stderr:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr[-400:]}")
    return done.returncode == 0


def _run(*arguments: str) -> subprocess.CompletedProcess:
    stop_clocks()
    command = [sys.executable, "-m", "pmd", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=600)


def fuzz_fits(number: int, seed: int, folder: Path, counts: Counter) -> Iterator[str]:
    """Train for an epoch with accepted configurations that change one to three settings of the smallest run."""
    draw, file = random.Random(seed), folder / "run.yaml"
    world = {"families": 2, "train_per_family": 1, "validation_per_family": 1, "test_per_family": 1}
    small = {
        "data": {"task": "tiny", "world": world},
        "verification": {"samples": 1, "final_samples": 1, "pass_at": [1]},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
    }
    fixed = ("data.", "verification.", "model.path", "model.prompts", "run_dir", "ckpt", "rollouts.engine")
    keys = [key for key in KEYS if not key.startswith(fixed)]
    made = 0
    while made < number:
        plain = typing.cast(dict, OmegaConf.to_container(OmegaConf.merge(bases()[0], small)))
        for _ in range(draw.choice([1, 2, 3])):
            key = draw.choice(keys)
            set_at(plain, key, sensible_value(draw, key))
        with contextlib.suppress(RecursionError, ValueError):
            file.write_bytes(yaml.dump(plain, allow_unicode=True).encode("utf-8", "surrogatepass"))
        with Deadline():
            if not accepts(file):
                continue
        made += 1
        arguments = [f"--config={file}", f"--run_dir={folder / str(made)}"]
        yield from tried(lambda a=arguments: _fit_ends(a), counts, file.read_text)


def _fit_ends(arguments: list[str]) -> bool:
    done = _run("fit", *arguments)
    if "Traceback" in done.stderr or done.returncode not in (0, 1, 2):
        raise AssertionError(f"exit code {done.returncode}: {done.stderr[-600:]}")
    return done.returncode == 0


LINES: list[dict[str, Any]] = [
    {"id": "a", "prompt": "2 + 2?", "verifier": "exact", "answer": "4"},
    {"id": "b", "prompt": "Which?\nA: x\nB: y", "verifier": "mcq", "answer": "B", "domain": "d", "memory_key": "k"},
    {"id": "c", "system": "Be brief.", "messages": [{"role": "user", "content": "x"}], "verifier": "exact",
     "answer": "x"},
    {"id": "d", "prompt": "p", "verifier": "code",
     "tests": {"kind": "stdin", "cases": [{"input": "1", "output": "1"}]}},
    {"id": "e", "prompt": "p", "verifier": "code",
     "tests": {"kind": "functional", "entry": "f", "cases": [{"args": [1], "expected": [1, {"a": 2.5}]}],
               "time_limit_s": 1}},
    {"id": "f", "prompt": "p", "verifier": "tool_use", "answer": '[{"Action": "go", "Action_Input": "{\\"x\\": 1}"}]'},
    {"id": "g", "prompt": "p", "verifier": "os.system"},
]  # fmt: skip


def mutated_line(draw: random.Random) -> bytes:
    line = copy.deepcopy(draw.choice(LINES))
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        holder: Any = line
        while draw.random() < 0.5:
            inner = list(holder.values()) if isinstance(holder, dict) else holder
            inner = [part for part in inner if isinstance(part, dict | list) and part]
            if not inner:
                break
            holder = draw.choice(inner)
        value = any_value(draw)
        if isinstance(holder, list):
            holder[draw.randrange(len(holder))] = value
        elif draw.random() < 0.2:
            holder.pop(draw.choice(list(holder)), None)
        else:
            holder[draw.choice([*holder, *line, "choices", "extra"])] = value
    try:
        raw = json.dumps(line).encode()
    except (RecursionError, ValueError):
        raw = b'{"id": ' + b"[" * 100_000
    if draw.random() < 0.1:
        cut = draw.randrange(len(raw))
        raw = (
            raw[:cut] + draw.choice([b"\xff", b"\\ud83d", b"{", b'"', b"NaN", b"1e999", b"\0", b"9" * 5000]) + raw[cut:]
        )
    return raw.replace(b"\n", b" ")


def reachable_problem(task: Task) -> str | None:
    """Return what is senseless about an accepted task: text that nothing can encode, an answer never reached."""
    for text in (task.task_id, task.answer, task.domain, task.memory_key, *(m.content for m in task.messages)):
        text.encode("utf-8")
    json.dumps(dict(task.tests), allow_nan="nan" not in repr(task.tests).casefold())
    if task.verifier in ("exact", "mcq") and not verify(task, f"<answer>{task.answer}</answer>").correct:
        return f"{task.answer!r} is never right"
    if task.verifier not in ("exact", "mcq", "math", "code", "tool_use", "boxes"):
        return f"verifier {task.verifier} was not allowed"
    return None


def fuzz_lines(number: int, seed: int, folder: Path, counts: Counter) -> Iterator[str]:
    """Read mutated lines of task files."""
    draw, file = random.Random(seed), folder / "tasks.jsonl"
    for _ in range(number):
        raw = mutated_line(draw)
        file.write_bytes(raw + b"\n")
        yield from tried(lambda: _line_accepted(file), counts, lambda raw=raw: repr(raw))


def _line_accepted(file: Path) -> bool:
    tasks, problems = read_task_file(str(file), "train", DataConfig(task="jsonl"))
    for problem in problems:
        problem.encode("utf-8")
        assert str(file) in problem, problem
    for task in tasks:
        if problem := reachable_problem(task):
            raise AssertionError(f"accepted: {problem}")
    assert bool(tasks) != bool(problems), (tasks, problems)
    return bool(tasks)


#: Name of the option: what it fuzzes, and how many by default.
KINDS = {
    "configs": (fuzz_configs, 10_000),
    "commands": (fuzz_commands, 100),
    "lines": (fuzz_lines, 5_000),
    "fits": (fuzz_fits, 0),
}


def main() -> int:
    """Run every kind; return 1 if there was a surprise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (function, number) in KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=(function.__doc__ or "").strip())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    surprises = 0
    for name, (function, _) in KINDS.items():
        counts, started = Counter(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for surprise in function(getattr(options, name), options.seed, Path(folder), counts):
                print(f"  {name}: {surprise}", flush=True)
        surprises += counts["surprises"]
        print(f"{name}, seed {options.seed}: {dict(counts)}, {time.monotonic() - started:.0f} s", flush=True)
    return int(surprises > 0)


if __name__ == "__main__":
    sys.exit(main())
