"""Reads rows of any table as lines of fields that `jsonl.py` checks: files of several formats, data sets of the Hub.

`data.columns` says which column holds what. A row of a multiple-choice set becomes a question with lettered options; an
answer that stands at the end of a worked solution is taken from it.
"""

import csv
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmd.config.schema import DataConfig
from pmd.tasks.combined import describe_part_problems, encode
from pmd.tasks.hub import load_rows
from pmd.tasks.lines import Line, read_lines
from pmd.types import Split

#: Fields of a task that a column can be named for. `choices` is a column with a list, or a list of columns, the right
#: one first.
FIELDS = ("id", "prompt", "messages", "system", "answer", "tests", "verifier", "domain", "memory_key", "choices")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_REQUEST = "\nPut the letter of the correct option between <answer> and </answer>."
EMPTY = (None, "")
#: Fields of the csv module may be as long as a program with its tests.
csv.field_size_limit(min(sys.maxsize, 1 << 27))


def is_data_set(path: str) -> bool:
    """Whether the package datasets reads it: a folder, or no local file but of the form of a data set's id."""
    is_table = Path(path).suffix in (".jsonl", ".json", ".csv", ".parquet", ".gz")
    is_id = not is_table and not Path(path).exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path))
    return is_id or Path(path).is_dir()


def read_table(path: str, split: Split, config: DataConfig, seed: int) -> tuple[list[Line], list[str]]:
    """Return the rows of a file, a folder of files, or a data set of the Hub as lines with a task's fields.

    Args:
        seed: shuffles the options of a row whose right answer always comes first.

    Raises:
        ConfigError: the data set cannot be loaded from the Hub or from its folder.
    """
    lines, problems = _read(path, split, config)
    unknown = sorted(
        {str(column) for column in _columns_named(config.columns)} - {key for row in lines for key in row.fields}
    )
    if lines and unknown:
        there = ", ".join(sorted(lines[0].fields)[:20])
        problems.append(f"data.columns: {path} has no column {', '.join(unknown)}; its columns are {there}.")
        return [], problems
    rows = []
    for line in lines:
        wrong = _describe_choices(line, config.columns["choices"]) if "choices" in config.columns else None
        if wrong is None:
            rows.append(Line(line.path, line.number, task_fields(line, split, config, seed)))
        else:
            problems.append(wrong)
    return rows, problems


def _columns_named(columns: Mapping[str, str | list[str]]) -> Iterator[str]:
    for named in columns.values():
        yield from [named] if isinstance(named, str) else named


def _read(path: str, split: Split, config: DataConfig) -> tuple[list[Line], list[str]]:
    if is_data_set(path):
        name = config.train_split if split == "train" else config.test_split or ""
        return _lines(Path(path), load_rows(path, name, name=config.subset)), []
    file = Path(path)
    if not file.is_file():
        return [], [f"{path}: no such file; give a JSON Lines, JSON, CSV or Parquet file with one task per row."]
    kind = file.suffixes[-2] if file.suffix == ".gz" and len(file.suffixes) > 1 else file.suffix
    try:
        if kind == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as opened:
                return _lines(file, csv.DictReader(opened, strict=True)), []
        if kind == ".parquet":
            from pyarrow.parquet import read_table as read_parquet

            return _lines(file, read_parquet(file).to_pylist()), []
        if kind == ".json":
            return _lines(file, _rows_of(json.loads(file.read_text(encoding="utf-8-sig")))), []
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # pyarrow's errors are ValueErrors
        return [], [f"{path}: cannot be read as {kind[1:]} ({' '.join(str(error).split())[:200]}); repair the file."]
    return read_lines(file)


def _rows_of(value: Any) -> list[Any]:
    """Return the rows of a JSON file: a list, or the one list in an object."""
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("it is no list of objects")
    return value


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Number the rows from 1."""
    named = [{str(key): value for key, value in row.items()} for row in rows]
    return [Line(path, number, row) for number, row in enumerate(named, start=1)]


def task_fields(line: Line, split: Split, config: DataConfig, seed: int) -> dict[str, Any]:
    """Return a row with a task's fields besides its own columns, which verifiers of the user's own may read."""
    row = {key: value for key, value in line.fields.items() if value is not None or key not in FIELDS}
    for field, column in config.columns.items():
        if field != "choices" and isinstance(column, str):
            value = line.fields.get(column)
            if value is None:
                row.pop(field, None)
            else:
                row[field] = value if field == "answer" else as_text(value)
    if isinstance(row.get("prompt"), list) and "messages" not in row:  # as in TRL's and OpenAI's data sets
        row["messages"] = row.pop("prompt")
    row.setdefault("id", f"{split}-{line.number}")
    if config.verifier is not None:
        row.setdefault("verifier", verifier_text(config.verifier))
    if "choices" in config.columns:
        _add_choices(row, line, config.columns["choices"], random.Random(f"{seed}/{row['id']}"))
    elif config.answer_after is not None and isinstance(answer := row.get("answer"), str):
        row["answer"] = answer.rpartition(config.answer_after)[2].strip()
    if config.prompt_suffix is not None and isinstance(prompt := row.get("prompt"), str):
        row.setdefault("memory_key", prompt)
        row["prompt"] = prompt + config.prompt_suffix.replace("\\n", "\n")
    return row


def verifier_text(verifier: str | list[Any]) -> str:
    """Return how a task names the verifier, or the verifiers, of `data.verifier`."""
    return verifier if isinstance(verifier, str) else encode(verifier)


def as_text(value: Any) -> Any:
    """Return a number that stands where a text belongs as text, as it is written."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _add_choices(row: dict[str, Any], line: Line, named: str | list[str], random: random.Random) -> None:
    """Write lettered options under the question, and the right one's letter as the answer.

    A list of columns has the right option first, so the options are shuffled. A column with a list keeps its order, and
    the answer is the position of the right option, its letter or its text.
    """
    if isinstance(named, str):
        column, answer = line.fields.get(named), row.get("answer")
        options = [str(option) for option in _options(column)]
        labels = column.get("label") if isinstance(column, dict) else None
        if isinstance(labels, list) and answer in labels:  # such as ARC's, some of which count from 1
            answer = LETTERS[labels.index(answer)]
        answer = _letter_of(answer, _options(column))
    else:
        options = [str(value) for column in named if (value := line.fields.get(column)) not in EMPTY]
        right = options[0]
        random.shuffle(options)
        answer = LETTERS[options.index(right)]
    if not isinstance(row.get("prompt"), str):
        return
    row["answer"] = answer
    row.setdefault("memory_key", row["prompt"])
    lettered = "".join(f"\n{letter}: {option}" for letter, option in zip(LETTERS, options, strict=False))
    row["prompt"] += lettered + LETTER_REQUEST
    row.setdefault("verifier", "mcq")


def _describe_choices(line: Line, named: str | list[str]) -> str | None:
    """Return what is wrong with the options of a row, or None."""
    if isinstance(named, str):
        options = _options(line.fields.get(named))
        if 2 <= len(options) <= len(LETTERS) and not any(option in EMPTY for option in options):
            return None
        rule = f"must be a list of 2 to {len(LETTERS)} options, none of them empty"
        return line.problem(named, rule, "repair it, or leave the row out")
    right, *others = named
    if line.fields.get(right) in EMPTY:
        return line.problem(right, "is the right option and must not be empty", "repair it, or leave the row out")
    if all(line.fields.get(other) in EMPTY for other in others):
        return line.problem(others[0], "there must be another option", "give one, or leave the row out")
    return None


def _options(value: Any) -> Sequence[Any]:
    """Return a list of options; some sets hold `{text: [...], label: [...]}`, CSV files the text of a list."""
    if isinstance(value, str):
        try:
            value = json.loads(value.replace("'", '"'))
        except ValueError:
            return []
    if isinstance(value, dict):
        value = value.get("text", list(value.values()))
    return value if isinstance(value, list) else []


def _letter_of(answer: Any, found: Sequence[Any]) -> Any:
    """Return the letter of the right option from its position, letter or text; the answer itself if it is none.

    A number is a position, unless the options are numbers, too, and it is one of them.
    """
    if isinstance(answer, int) and answer not in found and 0 <= answer < len(found):
        return LETTERS[answer]
    text, options = str(answer).strip(), [str(option) for option in found]
    if text.isdecimal() and int(text) < len(options) and text not in options:
        return LETTERS[int(text)]
    if text in options and text not in LETTERS[: len(options)]:
        return LETTERS[options.index(text)]
    return text


def check_columns(config: DataConfig) -> list[str]:
    """Return what is wrong with the keys that say how a table is read."""
    problems = [
        f"data.columns.{field}: a task has no such field; use {', '.join(FIELDS)}."
        for field in config.columns
        if field not in FIELDS
    ]
    problems += [
        f"data.columns.{field}: names a list of columns, which only `choices` can; name one column."
        for field, named in config.columns.items()
        if isinstance(named, list) and field != "choices"
    ]
    if isinstance(config.verifier, list):
        problems += describe_part_problems("data.verifier", config.verifier)
    if isinstance(named := config.columns.get("choices"), list) and len(named) < 2:
        problems.append("data.columns.choices: a list of columns needs at least two, the right option first.")
    return problems
