"""Your own tasks, from a JSON Lines file or another table (table.py).

Each line holds `prompt` (or `messages`), `verifier`, what the verifier compares with (`answer` or `tests`), and
optionally `id`, `domain`, `system` and `memory_key`. Other fields are for verifiers of your own. All bad lines are
reported at once.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from pmd.config.schema import DataConfig
from pmd.tasks.code_tests import check_tests
from pmd.tasks.combined import describe_part_problems, is_combined, parts_of
from pmd.tasks.lines import Line
from pmd.tasks.splits import hold_out_test
from pmd.tasks.table import as_text, check_columns, read_table, verifier_text
from pmd.types import Message, Split, Task

#: The built-in verifiers; any other is given by its class path.
NAMED_VERIFIERS = ("mcq", "exact", "math", "tool_use", "code", "boxes", "each_box")
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
MAX_ID_CHARACTERS = 500  # ids are written into file names of traces, tables and error messages


def read_jsonl(config: DataConfig, seed: int) -> tuple[list[Task], list[str]]:
    """Return train and test tasks from two files, or from one file with a seeded share held out."""
    if config.path is None:
        return [], ["data.path=null: task `jsonl` reads a file; give its path."]
    if problems := check_columns(config):
        return [], problems
    train, problems = read_task_file(config.path, "train", config, seed)
    held_out_path = config.validation_path or (config.path if config.test_split is not None else None)
    if held_out_path is not None:
        held_out, wrong = read_task_file(held_out_path, "test", config, seed)
        train_ids = {task.task_id for task in train}
        wrong += [
            f"{held_out_path}: id={json.dumps(task.task_id)} must be unique but also occurs in {config.path}; "
            "rename one."
            for task in held_out
            if task.task_id in train_ids
        ]
        return train + held_out, problems + wrong
    tasks, too_few = hold_out_test(train, seed, config.path, "add some, or give data.validation_path")
    return tasks, problems or too_few


def read_task_file(path: str, split: Split, config: DataConfig, seed: int = 0) -> tuple[list[Task], list[str]]:
    """Return the tasks of one table, and a sentence for each error in it.

    The configuration's own verifier is trusted; those that the rows name must be in `allow_modules`, because naming one
    imports and runs it.
    """
    lines, problems = read_table(path, split, config, seed)
    trusted = list(config.allow_modules)
    if config.verifier is not None:
        trusted += [part.name.rpartition(".")[0] for part in parts_of(verifier_text(config.verifier))]
    first_line: dict[str, int] = {}
    tasks = []
    for line in lines:
        wrong = check_line(line, trusted)
        task_id = str(line.fields.get("id"))
        if "id" in line.fields and task_id in first_line:
            wrong.append(
                line.problem("id", f"occurs in line {first_line[task_id]} too, ids must be unique", "rename one")
            )
        first_line.setdefault(task_id, line.number)
        problems += wrong
        if not wrong:
            tasks.append(make_task(line.fields, split, f"{path}:{line.number}"))
    return tasks, problems


def make_task(fields: dict[str, Any], split: Split, place: str = "") -> Task:
    """Build a Task from a line in which `check_line` found no error; `place` is FILE:LINE."""
    messages = [Message("system", fields["system"])] if fields.get("system") else []
    answer = as_text(fields.get("answer"))
    if "prompt" in fields:
        messages.append(Message("user", fields["prompt"]))
    else:
        messages += [Message(message["role"], message["content"]) for message in fields["messages"]]
    return Task(
        str(fields["id"]),
        tuple(messages),
        fields["verifier"],
        split,
        answer=answer if isinstance(answer, str) else "",
        tests=fields.get("tests") or {},
        domain=fields.get("domain") or "",
        memory_key=fields.get("memory_key") or "",
        columns={} if fields["verifier"] in NAMED_VERIFIERS else {k: v for k, v in fields.items() if k != "verifier"},
        place=place,
    )


def check_line(line: Line, allow_modules: Sequence[str] = ()) -> list[str]:
    """Return a sentence for each field of the line that breaks a rule."""
    row = line.fields
    problems = []
    if not isinstance(row.get("id"), str | int) or isinstance(row.get("id"), bool) or row["id"] == "":
        problems.append(line.problem("id", "must be a non-empty string", "give each task its own id, or none"))
    elif not str(row["id"]).isprintable() or len(str(row["id"])) > MAX_ID_CHARACTERS:
        rule = f"must have at most {MAX_ID_CHARACTERS} characters, all of them printable"
        problems.append(line.problem("id", rule, "give a short name"))
    problems += _check_messages(line)
    for field in ("domain", "system", "memory_key"):
        if not isinstance(row.get(field), str | None):
            problems.append(line.problem(field, "must be a string", "write a string or leave it out"))
    verifier = row.get("verifier")
    return [*problems, *_check_verifiers(line, verifier, allow_modules)]


def _check_verifiers(line: Line, verifier: Any, allow_modules: Sequence[str]) -> Sequence[str]:
    """Check a verifier, or each of several."""
    if not isinstance(verifier, str) or not is_combined(verifier):
        return _check_verifier(line, verifier, allow_modules)
    try:
        wrong = describe_part_problems("verifier", json.loads(verifier))
    except (ValueError, RecursionError):
        wrong = ["it is no JSON"]
    if wrong:
        return [line.problem("verifier", " ".join(wrong), "write one name")]
    return [problem for part in parts_of(verifier) for problem in _check_verifier(line, part.name, allow_modules)]


def _check_verifier(line: Line, verifier: Any, allow_modules: Sequence[str]) -> Sequence[str]:
    if not isinstance(verifier, str) or (verifier not in NAMED_VERIFIERS and not CLASS_PATH.fullmatch(verifier)):
        rule = f"must be {', '.join(NAMED_VERIFIERS)} or a class path such as package.module.Class"
        return [line.problem("verifier", rule, "name one of them, or set data.verifier for all lines")]
    if verifier not in NAMED_VERIFIERS and not is_allowed(verifier, allow_modules):
        module = verifier.rpartition(".")[0]
        rule = "data may not name a module to import and run unless it is allowed"
        remedy = f"if {module} is yours, add --allow-module {module} (or data.allow_modules=[{module}])"
        return [line.problem("verifier", rule, remedy)]
    return _check_expected(line, verifier)


def is_allowed(class_path: str, allow_modules: Sequence[str]) -> bool:
    """Whether a class path is in one of the modules, or in a module of one of the packages."""
    module = class_path.rpartition(".")[0]
    return any(module == name or module.startswith(f"{name}.") for name in allow_modules)


def _check_messages(line: Line) -> list[str]:
    row = line.fields
    if "prompt" not in row and "messages" not in row:
        remedy = "write the question there, or name its column in data.columns.prompt"
        return [line.problem("prompt", "a task needs prompt or messages", remedy)]
    if "prompt" in row and "messages" in row:
        return [line.problem("prompt", "exactly one of prompt and messages must be given", "keep one of them")]
    if "prompt" in row:
        if isinstance(row["prompt"], str) and row["prompt"].strip():
            return []
        return [line.problem("prompt", "must be a non-empty string", "write the question there")]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        rule = "must be a list of {role: system|user|assistant, content: text}"
        return [line.problem("messages", rule, "write each message like this")]
    if not messages or messages[-1]["role"] != "user":
        return [line.problem("messages", "must end with a user message", "end with the question")]
    return []


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )


def _check_expected(line: Line, verifier: str) -> Sequence[str]:
    row = line.fields
    if verifier not in NAMED_VERIFIERS:
        return []  # what it needs is its own affair
    answer, tests = as_text(row.get("answer")), row.get("tests")
    problems = []
    if not isinstance(answer, str | None):
        problems.append(line.problem("answer", "must be a string or a number", "put it in quotes"))
    if not isinstance(tests, dict | None):
        problems.append(line.problem("tests", "must be an object", "write {...}"))
    if problems:
        return problems
    match verifier:
        case "code":
            rules = check_tests(tests)
            return [line.problem("tests", rule, "see `pmd score --help` for the format") for rule in rules]
        case "mcq" if not (answer and re.fullmatch("[A-Z]", answer)):
            return [line.problem("answer", "must be one capital letter", "write the letter of the correct option")]
        case "exact" | "math" if not (answer and answer.strip()):
            return [line.problem("answer", "must be a non-empty string", "write the correct answer")]
        case "exact" if answer and re.search("</?answer>", answer):
            rule = "can never be reached, because <answer> and </answer> end what is compared"
            return [line.problem("answer", rule, "write the answer without tags")]
        case "tool_use" if not _is_calls(answer):
            rule = "must be the JSON text of a list of {Action: name, Action_Input: JSON text}"
            return [line.problem("answer", rule, "write the expected calls")]
        case "tool_use" if (tests or {}).get("reading", "sdpo") not in ("sdpo", "strict"):
            return [line.problem("tests", "reading must be sdpo or strict", "write one of them, or leave tests out")]
    return []


def _is_calls(answer: str | None) -> bool:
    try:
        calls = json.loads(answer or "", parse_constant=_refuse_constant)
        return isinstance(calls, list) and all(
            isinstance(call["Action"], str) and isinstance(_inputs(call["Action_Input"]), dict) for call in calls
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _inputs(value: Any) -> Any:
    return json.loads(value, parse_constant=_refuse_constant) if isinstance(value, str) else value


def _refuse_constant(constant: str) -> None:
    """NaN and Infinity are not JSON, so no call can be written that holds them."""
    raise ValueError(f"{constant} is not JSON")
