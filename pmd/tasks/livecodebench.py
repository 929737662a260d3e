"""LiveCodeBench v6 (Jain et al. 2024, arXiv 2403.07974): programming problems from a window of contest dates.

The window is data.first_day to data.end_day; the defaults are v6's (131 problems). The data come from the Hub
(`livecodebench/code_generation_lite`, revision refs/pr/6) or from local JSON Lines in the same format. As in SDPO,
train and test use the same problems: training sees the public tests and a seeded half of the private ones, evaluation
sees all. So each problem becomes two tasks, whose ids differ only in the suffix `/train`.

Private tests may be base64(zlib(pickle(JSON text))). They are decoded without unpickling: the code walks the opcodes,
allows a single string, and caps its size. The instructions around the question are our choice.
"""

import base64
import binascii
import json
import pickletools
import random
import zlib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pmd.config.schema import DataConfig
from pmd.tasks.code_tests import check_tests
from pmd.tasks.hub import load_rows
from pmd.tasks.lines import iterate_lines
from pmd.tasks.splits import TRAIN_SUFFIX
from pmd.types import Message, Split, Task

HUB_ID, HUB_REVISION = "livecodebench/code_generation_lite", "refs/pr/6"
TIME_LIMIT_S, MEMORY_MB = 6.0, 4096
MAX_DECODED_BYTES = 1 << 29
STRING_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
PLAIN_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
STDIN_INSTRUCTION = (
    "Read the input from stdin and write the answer to stdout. Put the whole program into one code block:"
)
STARTER_INSTRUCTION = "Complete this starter code and put the whole solution into one code block:"


def read_livecodebench(config: DataConfig, seed: int) -> tuple[list[Task], list[str]]:
    """Return both tasks of each problem in the window, and a sentence for each error in the files."""
    rows: Iterable[tuple[str, Mapping[str, Any] | str]]
    if config.path is None:
        rows = ((HUB_ID, row) for row in load_rows(HUB_ID, "test", HUB_REVISION))
    else:
        path = Path(config.path)
        files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            return [], [f"data.path={path}: contains no JSON Lines file; give LiveCodeBench's file or folder."]
        entries = (entry for file in files for entry in iterate_lines(file))
        rows = (("", e) if isinstance(e, str) else (f"{e.path}:{e.number}", e.fields) for e in entries)
    first_day, end_day = date.fromisoformat(config.first_day), date.fromisoformat(config.end_day)
    tasks: list[Task] = []
    problems: list[str] = []
    for place, row in rows:
        try:
            if isinstance(row, str):
                problems.append(row)
            elif first_day <= date.fromisoformat(str(row["contest_date"])[:10]) < end_day:
                tasks += make_tasks(row, seed, config.scorer)
        except KeyError as error:
            problems.append(f"{place}: {error.args[0]} is missing; give a line of code_generation_lite.")
        except (ValueError, TypeError) as error:
            problems.append(f"{place}: {error}; give a line of code_generation_lite.")
    if not tasks and not problems:
        window = f"data.first_day={config.first_day} and data.end_day={config.end_day}"
        problems.append(f"{window}: no problem of {config.path or HUB_ID} lies between them; widen the window.")
    return tasks, problems


def make_tasks(row: Mapping[str, Any], seed: int, scorer: str = "lcb") -> list[Task]:
    """Return the training and the test task of one problem.

    Raises:
        ValueError: if a field is not in upstream's format.
    """
    name = json.loads(row["metadata"] or "{}").get("func_name")
    public = [read_case(case, name) for case in json.loads(row["public_test_cases"])]
    private = [read_case(case, name) for case in decode_tests(row["private_test_cases"])]
    task_id = f"livecodebench/{row['question_id']}"
    order = list(range(len(private)))
    random.Random(f"{seed} {task_id}").shuffle(order)
    shown = sorted(order[: (len(private) + 1) // 2])
    starter = row["starter_code"]
    instruction = (
        f"{STARTER_INSTRUCTION}\n```python\n{starter}\n```"
        if starter
        else f"{STDIN_INSTRUCTION}\n```python\n# your code\n```"
    )
    messages = (Message("user", f"{row['question_content']}\n\n{instruction}"),)
    parts: tuple[tuple[str, Split, list[dict[str, Any]]], ...] = (
        (task_id + TRAIN_SUFFIX, "train", public + [private[number] for number in shown]),
        (task_id, "test", public + private),
    )
    tasks = []
    for part_id, split, cases in parts:
        kind = {"kind": "functional", "entry": name} if name else {"kind": "stdin"}
        tests = {**kind, "cases": cases, "time_limit_s": TIME_LIMIT_S, "memory_mb": MEMORY_MB}
        tests |= {"scorer": scorer, "num_public": len(public)}
        if wrong := check_tests(tests):
            raise ValueError(f"its tests cannot be run: {'; '.join(wrong)}")
        difficulty = row.get("difficulty", "")
        key = row["question_content"]
        tasks.append(Task(part_id, messages, "code", split, tests=tests, memory_key=key, domain=difficulty))
    return tasks


def read_case(case: Mapping[str, str], name: str | None) -> dict[str, Any]:
    """Return a test in our format; the input of a functional one has one JSON argument per line."""
    if name is None:
        return {"input": case["input"], "output": case["output"]}
    arguments = [json.loads(line) for line in case["input"].split("\n")]
    return {"args": arguments, "expected": json.loads(case["output"])}


def decode_tests(text: str) -> list[Mapping[str, str]]:
    """Return the tests of a `private_test_cases` field: JSON text, or the packed format.

    Raises:
        ValueError: if it is neither, is too large, or contains pickle opcodes other than those of one string.
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_DECODED_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"private_test_cases are neither JSON nor base64 of zlib ({error})") from error
    if not unpacker.eof:
        raise ValueError(f"private_test_cases are cut off or larger than {MAX_DECODED_BYTES} bytes")
    return json.loads(string_of_pickle(data))


def string_of_pickle(data: bytes) -> str:
    """Return the single string in a pickle, without executing it.

    Raises:
        ValueError: if the pickle contains anything else.
    """
    strings = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in STRING_OPCODES:
            strings.append(argument)
        elif opcode.name not in PLAIN_OPCODES:
            raise ValueError(
                f"private_test_cases hold the pickle opcode {opcode.name}, which is not needed for a string"
            )
    if len(strings) != 1 or not isinstance(strings[0], str):
        raise ValueError(f"private_test_cases hold {len(strings)} strings instead of one")
    return strings[0]
