"""Tasks from JSON Lines files: splits, and every bad line named."""

import json

import pytest

from pmd.config.schema import DataConfig
from pmd.errors import ConfigError
from pmd.tasks import describe_data_problems, load_tasks, validates_on_test
from pmd.tasks.jsonl import NAMED_VERIFIERS
from pmd.tasks.lines import describe_unusable


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def row(number, **changes):
    fields = {"id": f"p{number}", "prompt": f"What is {number}?", "verifier": "exact", "answer": str(number), **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def test_one_file_is_split_by_seed(tmp_path):
    config = DataConfig(task="jsonl", path=write(tmp_path / "a.jsonl", [row(n) for n in range(50)]))
    first, again, other = (load_tasks(config, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(first[part]) for part in ("train", "validation", "test")] == [43, 2, 5]
    assert not validates_on_test(first)
    config = DataConfig(task="jsonl", path=config.path, validation_share=0.2)
    sizes = {part: len(tasks) for part, tasks in load_tasks(config, seed=0).items()}
    assert sizes == {"train": 36, "validation": 9, "test": 5}
    published = load_tasks(DataConfig(task="jsonl", path=config.path, validation_share=0.0), seed=0)
    assert [len(published[part]) for part in ("train", "test")] == [45, 5]
    assert validates_on_test(published)


def test_equal_tasks_stay_on_one_side(tmp_path):
    rows = [row(n, prompt=f"What is {n % 10}?") for n in range(40)]
    tasks = load_tasks(DataConfig(task="jsonl", path=write(tmp_path / "a.jsonl", rows)), seed=0)
    assert not {t.question for t in tasks["train"]} & {t.question for t in tasks["test"]}


def test_two_files(tmp_path):
    train = write(tmp_path / "train.jsonl", [row(1, domain="d", system="Be brief.", memory_key="key")])
    held_out = write(tmp_path / "held.jsonl", [row(2, prompt=..., messages=[{"role": "user", "content": "Hm?"}])])
    tasks = load_tasks(DataConfig(task="jsonl", path=train, validation_path=held_out), seed=0)
    (learnt,), (held,) = tasks["train"], tasks["validation"]
    assert (learnt.domain, learnt.memory_key, learnt.messages[0].content) == ("d", "key", "Be brief.")
    assert (held.split, held.question) == ("test", "Hm?")


STDIN = {"kind": "stdin", "cases": [{"input": "1", "output": "1"}]}
BAD = [
    ('{"id": "x"', "not valid JSON"),
    (row(1, id=""), "id"),
    (row(2, prompt=...), "prompt is missing"),
    (row(3, prompt="  "), "prompt"),
    (row(4, messages=[]), "exactly one"),
    (row(5, prompt=..., messages=[{"role": "robot", "content": "x"}]), "messages"),
    (row(6, verifier="guess"), 'verifier="guess"'),
    (row(7, answer=[7]), "answer=[7]"),
    (row(8, verifier="mcq", answer="b"), "capital letter"),
    (row(9, answer=...), "answer is missing"),
    (row(10, domain=3), "domain=3"),
    (row(11, verifier="code"), "tests is missing"),
    (row(12, verifier="code", tests={**STDIN, "time_limit_s": -1}), "time_limit_s must"),
    (row(13, verifier="code", tests={**STDIN, "cases": [{"input": 1}]}), "cases[0]"),
    (row(14, verifier="code", tests={"kind": "functional", "cases": [{"args": [], "expected": 1}]}), "entry"),
    (row(15, verifier="tool_use", answer="{"), "JSON text"),
    (row(16, id="p17"), None),
    (row(17), "line 17 too"),
    ("\xff\xfe", None),
]


def test_every_bad_line_is_named_by_line_and_field(tmp_path):
    path = write(tmp_path / "bad.jsonl", [entry for entry, _ in BAD])
    problems = describe_data_problems(DataConfig(task="jsonl", path=path))
    for number, (_, words) in enumerate(BAD, start=1):
        about_line = [problem for problem in problems if f"bad.jsonl:{number}:" in problem]
        if words:
            assert len(about_line) == 1, (number, problems)
            assert words in about_line[0]
    with pytest.raises(ConfigError):
        load_tasks(DataConfig(task="jsonl", path=path), seed=0)


HALF = "half \ud83d"
CALLS = '[{"Action": "go", "Action_Input": %s}]'
UNUSABLE = [
    (row(1, prompt=HALF), 'prompt="half \\ud83d" holds half a character'),
    (row(2, id=HALF), "id="),
    (row(3, answer=HALF), "answer="),
    (row(4, system=HALF), "system="),
    (row(5, memory_key=HALF), "memory_key="),
    (row(6, domain=HALF), "domain="),
    (row(7, verifier=HALF), "verifier="),
    (row(8, prompt=..., messages=[{"role": "user", "content": HALF}]), "messages[0].content="),
    (row(9, verifier="code", tests=STDIN | {"cases": [{"input": HALF, "output": ""}]}), "tests.cases[0].input="),
    (row(10, choices=["a", HALF]), "choices[1]="),
    (row(11, **{HALF: "x"}), "the line has a key"),
    (row(12, answer="low \udc00 first"), "answer="),
    (
        row(
            13,
            verifier="code",
            tests={"kind": "functional", "entry": "f", "cases": [{"args": [], "expected": {"x": [1, float("nan")]}}]},
        ),
        "tests.cases[0].expected.x[1]=NaN can never be reached",
    ),
    (row(14, verifier="tool_use", answer=CALLS % '{"x": NaN}'), "JSON text"),
    (row(15, verifier="tool_use", answer=CALLS % '"{\\"x\\": Infinity}"'), "JSON text"),
    (row(16, answer="it is </answer> now"), "answer"),
    (row(17, id="\u001b[31mred"), "id="),
    (row(18, id="x" * 501), "at most 500"),
]


def test_what_cannot_be_encoded_or_reached_is_named_by_line_and_field(tmp_path):
    path = write(tmp_path / "bad.jsonl", [entry for entry, _ in UNUSABLE])
    problems = describe_data_problems(DataConfig(task="jsonl", path=path))
    for number, (_, words) in enumerate(UNUSABLE, start=1):
        about_line = [problem for problem in problems if f"bad.jsonl:{number}:" in problem]
        assert len(about_line) == 1, (number, problems)
        assert words in about_line[0]
        about_line[0].encode("utf-8")  # the message itself can be printed anywhere


def test_whole_characters_and_numbers_are_usable(tmp_path):
    whole = json.dumps(row(1, prompt="whole \U0001f600 é NaN", answer="NaN"))
    assert "\\ud83d" in whole
    path = write(tmp_path / "a.jsonl", [whole, *(row(n) for n in range(2, 30))])
    assert describe_data_problems(DataConfig(task="jsonl", path=path)) == []
    assert describe_unusable({"a": ["x", 1.5, None, True, {"b": "\U0001f600"}]}) is None


def test_a_class_path_in_data_needs_permission(tmp_path):
    rows = [row(n, verifier="my_checks.inner.Check") for n in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    for allowed in ([], ["my_check"], ["inner"], ["my_checks.inner.Check"]):
        problems = describe_data_problems(DataConfig(task="jsonl", path=path, allow_modules=allowed))
        assert len(problems) == 20
        assert "a.jsonl:1: verifier=" in problems[0]
        assert "--allow-module my_checks.inner (or data.allow_modules=[my_checks.inner])" in problems[0]
    for allowed in (["my_checks.inner"], ["my_checks"]):
        assert describe_data_problems(DataConfig(task="jsonl", path=path, allow_modules=allowed)) == []


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\n", b"[" * 100_000])
def test_files_without_a_usable_line_are_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert len(describe_data_problems(DataConfig(task="jsonl", path=str(tmp_path / "a.jsonl")))) == 1


def test_a_damaged_gzip_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08 nonsense")
    assert "cannot be read" in describe_data_problems(DataConfig(task="jsonl", path=str(tmp_path / "a.jsonl.gz")))[0]


def test_a_thousand_bad_lines_end_with_a_count(tmp_path):
    path = write(tmp_path / "bad.jsonl", ["{"] * 1000)
    problems = describe_data_problems(DataConfig(task="jsonl", path=path))
    assert len(problems) == 101
    assert problems[-1] == "... and 900 more."


def test_ids_shared_by_two_files_and_a_missing_path_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1)])
    assert "rename one" in describe_data_problems(DataConfig(task="jsonl", path=path, validation_path=path))[0]
    assert "give its path" in describe_data_problems(DataConfig(task="jsonl"))[0]


@pytest.mark.parametrize(
    "name", [n for n in NAMED_VERIFIERS if n not in ("code", "tool_use", "mcq", "boxes", "each_box")]
)
def test_named_verifiers_are_accepted(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [row(n, verifier=name) for n in range(20)])
    assert describe_data_problems(DataConfig(task="jsonl", path=path)) == []
