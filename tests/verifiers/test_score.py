"""`pmd score`: verdicts in order, bad lines named before anything runs, files that are safe."""

import json
import os

import pytest

from pmd.cli.score import main

CODE = {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}], "time_limit_s": 5, "memory_mb": 512}
TASKS = [
    {"id": "code", "prompt": "p", "verifier": "code", "tests": CODE},
    {"id": "call", "prompt": "p", "verifier": "code",
     "tests": {"kind": "functional", "entry": "add", "cases": [{"args": [1, 2], "expected": 3}]}},
    {"id": "choice", "prompt": "p\n\nA: x\nB: y", "verifier": "mcq", "answer": "B"},
    {"id": "text", "messages": [{"role": "user", "content": "p"}], "verifier": "exact", "answer": "blue"},
    {"id": "number", "prompt": "p", "verifier": "math", "answer": "\\frac{1}{2}"},
    {"id": "tool", "prompt": "p", "verifier": "tool_use", "answer": '[{"Action": "go", "Action_Input": "{}"}]'},
    {"id": "own", "prompt": "p", "verifier": "test_verifiers.Length"},
    {"id": "broken", "prompt": "p", "verifier": "test_verifiers.crash"},
    {"id": 7, "prompt": "p", "verifier": "exact", "answer": "x"},
]  # fmt: skip
COMPLETIONS = [
    ("code", "```python\nprint(sum(map(int, input().split())))\n```", "ok"),
    ("choice", "<answer>B</answer>", "ok"),
    ("code", "```python\nprint(4)\n```", "wrong_answer"),
    ("code", "```python\nprint(3)", "format"),
    ("call", "```python\ndef add(a, b):\n    return a + b\n```", "ok"),
    ("text", "<answer>blue</answer>", "ok"),
    ("number", "\\boxed{0.5}", "ok"),
    ("tool", "Action: go\nAction Input: {}", "ok"),
    ("own", "abc", "ok"),
    ("broken", "abc", "error"),
    (7, "x", "ok"),
    ("code", "```python\n1 / 0\n```", "runtime_error"),
    ("choice", "<answer>A</answer>", "wrong_answer"),
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(folder, tasks, completions, *flags):
    write(folder / "t.jsonl", tasks)
    write(folder / "c.jsonl", completions)
    arguments = [f"--tasks={folder / 't.jsonl'}", f"--completions={folder / 'c.jsonl'}", f"--out={folder / 'v.jsonl'}"]
    return main([*arguments, "--allow-module=test_verifiers", *flags])


def test_verdicts_come_in_the_order_of_the_completions(tmp_path, capsys):
    lines = [{"id": name, "completion": text} for name, text, _ in COMPLETIONS] * 3
    assert run(tmp_path, TASKS, lines) == 0
    verdicts = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [(v["id"], v["status"]) for v in verdicts] == [(name, status) for name, _, status in COMPLETIONS] * 3
    fields = {"id", "reward", "correct", "status", "feedback", "seconds"}
    optional = {"code": {"passed"}, "call": {"passed"}, "number": {"explanation"}}
    assert all(set(v) == fields | optional.get(v["id"], set()) for v in verdicts)
    assert {v["explanation"] for v in verdicts if v["id"] == "number"} == {"parsed gold: 1/2; parsed answer: 1/2"}
    assert all(v["passed"] == float(v["correct"]) for v in verdicts if "passed" in v)  # each has one test
    assert all(v["correct"] == (v["status"] == "ok") for v in verdicts)
    printed = capsys.readouterr().err
    assert printed.startswith("sandbox: level")
    assert "scored 39" in printed


def test_every_bad_line_is_named_before_anything_runs(tmp_path, capsys):
    bad_answer = {"id": "a", "prompt": "p", "verifier": "mcq", "answer": "b"}
    tasks = [bad_answer, {"id": "n", "prompt": "p", "verifier": "no.such"}, "{"]
    completions = [{"id": "a"}, {"completion": "x"}, "nonsense"]
    assert run(tmp_path, tasks, completions, f"--out={tmp_path / 'no' / 'v'}") == 2
    error = capsys.readouterr().err
    named = [
        "t.jsonl:1: answer",
        't.jsonl:2: verifier="no.such": data may not name a module',
        "t.jsonl:3",
        "c.jsonl:1: completion",
        "c.jsonl:2: id",
        "c.jsonl:3",
        "--out",
    ]
    for words in named:
        assert words in error, words
    assert "Traceback" not in error
    assert not (tmp_path / "v.jsonl").exists()


def test_data_cannot_name_a_module_that_was_not_allowed(tmp_path, capsys, monkeypatch):
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    task = {"id": "n", "prompt": "p", "verifier": "never_imported.Any"}
    assert run(tmp_path, [task], [{"id": "n", "completion": "x"}]) == 2
    assert "if never_imported is yours, add --allow-module never_imported" in capsys.readouterr().err
    assert run(tmp_path, [task], [{"id": "n", "completion": "x"}], "--allow-module", "never_imported") == 2
    assert "cannot be loaded (SystemExit: imported)" in capsys.readouterr().err


def test_completions_that_cannot_be_encoded_are_named(tmp_path, capsys):
    assert run(tmp_path, TASKS[2:3], [{"id": "choice", "completion": "half \ud83d"}]) == 2
    assert 'c.jsonl:1: completion="half \\ud83d" holds half a character' in capsys.readouterr().err


def test_unknown_ids_and_missing_files(tmp_path, capsys):
    assert run(tmp_path, TASKS[2:3], [{"id": "other", "completion": "B"}]) == 2
    assert 'id="other": must be the id of a task' in capsys.readouterr().err
    nowhere = str(tmp_path / "nowhere")
    assert main(["--tasks", nowhere, "--completions", nowhere, "--out", str(tmp_path / "v")]) == 2
    error = capsys.readouterr().err
    assert error.count("nowhere") >= 2


def test_input_files_are_never_overwritten(tmp_path, capsys):
    for name in ("t.jsonl", "c.jsonl"):
        assert run(tmp_path, TASKS[2:3], [{"id": "choice", "completion": "B"}], f"--out={tmp_path / name}") == 2
        assert "must not be one of the files that are read" in capsys.readouterr().err
        assert "choice" in (tmp_path / name).read_text()
    assert run(tmp_path, TASKS[2:3], [{"id": "choice", "completion": "B"}], f"--out={tmp_path}") == 2
    assert "cannot be written (Is a directory)" in capsys.readouterr().err
    os.mkfifo(tmp_path / "fifo")
    assert run(tmp_path, TASKS[2:3], [], f"--completions={tmp_path / 'fifo'}") == 2
    assert "must be a file, since it is read twice" in capsys.readouterr().err


def test_windows_byte_order_marks_and_line_ends_are_accepted(tmp_path):
    for name, line in (("t.jsonl", TASKS[2]), ("c.jsonl", {"id": "choice", "completion": "B"})):
        (tmp_path / name).write_text(f"\ufeff{json.dumps(line)}\r\n\r\n")
    paths = [f"--{name}={tmp_path / name[0]}.jsonl" for name in ("tasks", "completions")]
    assert main([*paths, f"--out={tmp_path / 'v.jsonl'}"]) == 0
    assert json.loads((tmp_path / "v.jsonl").read_text())["status"] == "ok"


def test_a_full_disk_is_reported(tmp_path, capsys):
    assert run(tmp_path, TASKS[2:3], [{"id": "choice", "completion": "B"}], "--out=/dev/full") == 2
    assert "--out=/dev/full cannot be written to (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--workers=0", "--sandbox=none"])
def test_bad_flags(tmp_path, flag, capsys):
    try:
        code = run(tmp_path, TASKS[2:3], [{"id": "choice", "completion": "B"}], flag)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert flag.split("=")[0] in capsys.readouterr().err
