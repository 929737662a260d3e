"""Tables of completions are written, and reach the loggers that have tables, in their own form, and no other logger."""

import json

from examples import make_rollout
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from pmd.callbacks.completions import EvaluationTables, log_table, markdown

ROWS = [{"task_id": "a", "completion": "x | y\nz"}, {"task_id": "b", "completion": "w"}]
OTHERS = (MLFlowLogger, TensorBoardLogger, CSVLogger)


def logger_of(kind: type, calls: list):
    """A logger of this kind whose client notes what it is given."""

    class Client:
        __isabstractmethod__ = False  # else it would seem to be one, as everything is there

        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args))

    class Recorded(kind):
        experiment = Client()
        run_id = "run"

        def __init__(self):
            pass

    return Recorded()


def with_tables(kind: type, calls: list):
    """A logger of this kind that takes tables itself."""

    class Taking(kind):
        def __init__(self):
            pass

        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
            calls.append(("log_table", key, columns, data, step))

    return Taking()


def test_each_logger_gets_its_own_form():
    calls: list = []
    own = with_tables(DummyLogger, calls)
    for logger in (with_tables(WandbLogger, calls), own, *(logger_of(kind, calls) for kind in OTHERS)):
        log_table(logger, "completions", ROWS, 7)
    columns = ["task_id", "completion"]
    table = ("log_table", "completions", columns, [["a", "x | y\nz"], ["b", "w"]], 7)
    assert calls == [
        table,
        table,
        ("log_table", "run", {"task_id": ["a", "b"], "completion": ["x | y\nz", "w"]}, "completions/step-000007.json"),
        ("add_text", "completions", markdown(ROWS), 7),
    ]


def test_a_cell_cannot_break_the_table():
    assert markdown(ROWS).splitlines() == [
        "| task_id | completion |", "| --- | --- |", "| a | x \\| y<br>z |", "| b | w |",
    ]  # fmt: skip


class Spelling:
    """Writes token ids as they are."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_an_evaluation_says_which_rows_had_memory_in_the_prompt(tmp_path):
    plain, shown = make_rollout(1, prompt_ids=(7, 8)), make_rollout(2, prompt_ids=(9,))
    rows = EvaluationTables(tmp_path / "new", Spelling()).write(
        "validation-000012", {False: [plain], True: [shown]}, 12
    )
    assert [(row["prompt"], row["memory_in_prompt"], row["step"], row["reward"]) for row in rows] == [
        ("7 8", False, 12, 1.0),
        ("9", True, 12, 1.0),
    ]
    lines = (tmp_path / "new" / "validation-000012.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
