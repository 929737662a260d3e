"""SciKnowEval (Feng et al. 2024, arXiv 2406.09098): level 3 multiple choice in four domains.

The data come from local files (`sciknoweval_{domain}_{train|test}.jsonl[.gz]`, or upstream's own JSON Lines) or from
the Hub. The Hub has one split, so its rows are split by SDPO's rule: per domain, in upstream order, keep level L3 with
two or four options, then `datasets`' `train_test_split(test_size=0.1, seed=42)`.

The system prompt, `sciknoweval_system_prompt.txt`, is that of SDPO (github.com/lasgroup/SDPO, Apache-2.0).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pmd.config.schema import DataConfig
from pmd.tasks.hub import load_rows
from pmd.tasks.lines import Line, read_lines
from pmd.tasks.splits import hold_out
from pmd.types import Message, Split, Task

HUB_ID = "hicai-zju/SciKnowEval"
SPLIT_SEED, TEST_SHARE = 42, 0.1
TYPES = ("mcq-4-choices", "mcq-2-choices")
REMEDY = "fix or remove the line"


def read_sciknoweval(config: DataConfig, seed: int) -> tuple[list[Task], list[str]]:
    """Return the tasks of the configured domains, and a sentence for each error in the files."""
    tested = config.domains if config.test_domains is None else config.test_domains
    tasks, problems = _read(replace(config, domains=list(dict.fromkeys([*config.domains, *tested]))))
    tasks = split_without_duplicates(tasks, seed) if config.own_split else tasks
    return [task for task in tasks if task.domain in (config.domains if task.split == "train" else tested)], problems


def _read(config: DataConfig) -> tuple[list[Task], list[str]]:
    if config.path is None:
        return split_upstream(load_rows(HUB_ID, "test"), config.domains), []
    path = Path(config.path)
    if not path.exists():
        return [], [f"data.path={config.path}: no such file or folder; give the folder of the SciKnowEval files."]
    if path.is_file():
        return _read_upstream_file(path, config.domains)
    tasks: list[Task] = []
    problems: list[str] = []
    for domain in config.domains:
        splits: tuple[Split, ...] = ("train", "test")
        for split in splits:
            found, wrong = _read_split_file(path, domain, split)
            tasks += found
            problems += wrong
    return tasks, problems


def system_prompt() -> str:
    """Return SDPO's system message, including its leading and trailing newline."""
    return files("pmd.tasks").joinpath("sciknoweval_system_prompt.txt").read_text()


def format_prompt(question: str, options: Mapping[str, str]) -> str:
    """Return SDPO's user message."""
    lines = "\n".join(f"{letter}: {text}" for letter, text in options.items())
    return f"{question}\n\n{lines}\nPlease reason step by step."


def split_permutation(count: int) -> tuple[list[int], list[int]]:
    """Return the row numbers of SDPO's train and test parts, drawn as `train_test_split` does."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count).tolist()
    num_test = math.ceil(TEST_SHARE * count)
    return order[num_test:], order[:num_test]


def split_upstream(rows: Iterable[Mapping[str, Any]], domains: Iterable[str]) -> list[Task]:
    """Filter upstream rows and split them by SDPO's rule."""
    wanted = {domain: [] for domain in domains}
    for row in rows:
        domain = row["domain"].lower()
        if domain in wanted and row["details"]["level"] == "L3" and row["type"] in TYPES:
            wanted[domain].append(row)
    tasks = []
    for domain, kept in wanted.items():
        parts: tuple[tuple[Split, list[int]], ...] = tuple(
            zip(("train", "test"), split_permutation(len(kept)), strict=True)
        )
        for split, numbers in parts:
            for number in numbers:
                row, choices = kept[number], kept[number]["choices"]
                options = dict(zip(choices["label"], choices["text"], strict=True))
                prompt = format_prompt(row["question"], options)
                tasks.append(
                    _task(f"sciknoweval/{domain}/{number}", domain, split, row["question"], prompt, row["answerKey"])
                )
    return tasks


def split_without_duplicates(tasks: Iterable[Task], seed: int) -> list[Task]:
    """Split 90/10 per domain; unlike in SDPO's split, no question is on both sides."""
    by_domain: dict[str, list[Task]] = {}
    for task in tasks:
        by_domain.setdefault(task.domain, []).append(replace(task, split="train"))
    parts = [hold_out(same_domain, TEST_SHARE, "test", seed) for same_domain in by_domain.values()]
    return [task for train, test in parts for task in (*train, *test)]


def _task(task_id: str, domain: str, split: Split, question: str, prompt: str, answer: str) -> Task:
    messages = (Message("system", system_prompt()), Message("user", prompt))
    return Task(task_id, messages, "mcq", split, answer=answer, memory_key=question, domain=domain)


def _read_split_file(folder: Path, domain: str, split: Split) -> tuple[list[Task], list[str]]:
    names = [f"sciknoweval_{domain}_{split}.jsonl{suffix}" for suffix in (".gz", "")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return [], [f"data.path={folder}: contains neither {names[0]} nor {names[1]}; add one or change data.domains."]
    lines, problems = read_lines(path)
    seen: set[str] = set()
    tasks = []
    for line in lines:
        wrong = [
            *_check(line),
            *([line.problem("id", "must be unique", REMEDY)] if line.fields.get("id") in seen else []),
        ]
        problems += wrong
        if not wrong:
            row = line.fields
            seen.add(row["id"])
            tasks.append(_task(row["id"], domain, split, row["question"], row["prompt"], row["answer"]))
    return tasks, problems


def _check(line: Line) -> list[str]:
    row = line.fields
    problems = [
        line.problem(field, "must be a non-empty string", REMEDY)
        for field in ("id", "question", "prompt", "answer")
        if not isinstance(row.get(field), str) or not row[field].strip()
    ]
    options = row.get("options")
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        problems.append(line.problem("options", "must map letters to strings", REMEDY))
    elif not problems and row["answer"] not in options:
        problems.append(line.problem("answer", f"must be one of the options {', '.join(options)}", REMEDY))
    return problems


def _read_upstream_file(path: Path, domains: Iterable[str]) -> tuple[list[Task], list[str]]:
    lines, problems = read_lines(path)
    for line in lines:
        problems += _check_upstream(line)
    if problems:
        return [], problems
    tasks = split_upstream((line.fields for line in lines), domains)
    empty = [domain for domain in domains if not any(task.domain == domain for task in tasks)]
    return tasks, [f"{path}: contains no L3 question of domain {domain}; change data.domains." for domain in empty]


def _check_upstream(line: Line) -> list[str]:
    row = line.fields
    problems = [
        line.problem(field, "must be a string", REMEDY)
        for field in ("question", "domain", "type", "answerKey")
        if not isinstance(row.get(field), str)
    ]
    details, choices = row.get("details"), row.get("choices")
    if not isinstance(details, dict) or "level" not in details:
        problems.append(line.problem("details", "must contain a level", REMEDY))
    if row.get("type") in TYPES:
        pair = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
        if not all(isinstance(part, list) for part in pair) or len(pair[0]) != len(pair[1]):  # type: ignore[arg-type]
            problems.append(line.problem("choices", "must contain `text` and `label` lists of equal length", REMEDY))
        elif row.get("answerKey") not in pair[1]:  # type: ignore[operator]
            problems.append(line.problem("answerKey", "must be one of the labels", REMEDY))
    return problems
