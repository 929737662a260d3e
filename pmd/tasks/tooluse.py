"""Tool use: ToolAlpaca's questions in SDPO's format, from local files.

Either a folder with `tooluse_train.jsonl` and `tooluse_test.jsonl` (plain or .gz), or a single file with a seeded share
held out. Lines have `prompt` (the whole user message), `answer` (JSON text of the calls) and optionally `id`
and `system`.
"""

from pathlib import Path

from pmd.config.schema import DataConfig
from pmd.tasks.jsonl import check_line, make_task
from pmd.tasks.lines import Line, read_lines
from pmd.tasks.splits import TEST_SHARE, hold_out
from pmd.types import Split, Task


def read_tooluse(config: DataConfig, seed: int) -> tuple[list[Task], list[str]]:
    """Return the tasks, and a sentence for each error in the files."""
    if config.path is None:
        return [], ["data.path=null: the tool-use tasks are not on the Hub; give the folder of SDPO's files."]
    path = Path(config.path)
    if path.is_file():
        tasks, problems = _read_file(path, "train")
        train, test = hold_out(tasks, TEST_SHARE, "test", seed)
        return train + test, problems
    if not path.is_dir():
        return [], [f"data.path={config.path}: no such file or folder; give the folder of the tool-use files."]
    tasks, problems = [], []
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        names = [f"tooluse_{split}.jsonl.gz", f"tooluse_{split}.jsonl"]
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            problems.append(
                f"data.path={path}: contains neither {names[0]} nor {names[1]}; add one, or give a single file."
            )
            continue
        part, wrong = _read_file(found, split)
        tasks += part
        problems += wrong
    return tasks, problems


def _read_file(path: Path, split: Split) -> tuple[list[Task], list[str]]:
    lines, problems = read_lines(path)
    tasks: dict[str, Task] = {}
    for line in lines:
        fields = {key: value for key, value in line.fields.items() if value is not None}
        fields.setdefault("id", f"tooluse/{fields.get('idx', line.number)}")
        completed = Line(path, line.number, {**fields, "verifier": "tool_use"})
        wrong = check_line(completed)
        if not wrong and str(fields["id"]) in tasks:
            wrong = [completed.problem("id", "must be unique", "rename one")]
        problems += wrong
        if not wrong:
            key = {"memory_key": question_of(fields["prompt"])} if "prompt" in fields else {}
            tasks[str(fields["id"])] = make_task({**completed.fields, **key}, split)
    return list(tasks.values()), problems


def question_of(prompt: str) -> str:
    """Return what the user asks, without the list of tools and the format."""
    return prompt.rsplit("Question:", 1)[-1].strip()
