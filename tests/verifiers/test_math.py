"""The mathematics verifier: no wrong answer accepted, the usual forms of a right one accepted, and it says why."""

import io
import json
import time

import pytest
from math_pairs import all_pairs
from rich.console import Console

from pmd.batch import Example
from pmd.cli.inspect import show
from pmd.cli.score import main
from pmd.config.schema import DataConfig, ModelConfig
from pmd.errors import ConfigError
from pmd.pretrained import load_tokenizer
from pmd.tasks.jsonl import read_task_file
from pmd.tasks.prompts.chat import ChatPrompts
from pmd.teacher import TeacherContext
from pmd.trace import _describe
from pmd.types import Completion, Message, Rollout, Task, Verdict
from pmd.verifiers.exact import tagged_answer
from pmd.verifiers.mathematics.judge import gold_problem, judge
from pmd.verifiers.pool import verify
from pmd.verifiers.resolve import prepare_verifiers

PAIRS = all_pairs()


def task(answer: str) -> Task:
    return Task("t", (Message("user", "Q?"),), "math", "train", answer=answer)


def judged(gold: str, completion: str) -> bool:
    is_tagged = "<answer>" in completion
    return judge(gold, tagged_answer(completion) if is_tagged else completion, is_tagged=is_tagged).correct


def test_every_pair_whose_truth_is_known_is_judged_right():
    assert len(PAIRS) >= 1500
    assert min(sum(pair.correct for pair in PAIRS), sum(not pair.correct for pair in PAIRS)) >= 700
    assert [pair for pair in PAIRS if judged(pair.gold, pair.completion) != pair.correct] == []


def test_every_gold_of_the_pairs_can_be_judged_and_equals_itself():
    golds = sorted({pair.gold for pair in PAIRS})
    assert [gold for gold in golds if gold_problem(gold)] == []
    assert [gold for gold in golds if not judged(gold, f"\\boxed{{{gold}}}")] == []


@pytest.mark.parametrize(
    ("answer", "text", "status"),
    [
        ("1/2", "so \\boxed{0.5}", "ok"),
        ("42", "\\boxed{41}", "wrong_answer"),
        ("42", "no idea", "format"),
        ("42", "", "format"),
        ("42", "\\boxed{}", "format"),
        ("42", "\\boxed{42", "format"),  # cut off: it might have become 420
        ("42", "\\boxed{" + "(" * 3000 + "42", "format"),
        ("42", "\\boxed{" + "(" * 3000 + "42" + ")" * 3000 + "}", "wrong_answer"),
        ("42", "\\boxed{" + "-" * 15_001 + "42}", "wrong_answer"),
        ("42", "\\boxed{" + "x^" * 7000 + "42}", "wrong_answer"),
        ("42", "\\boxed{" + "1+" * 9000 + "1}", "wrong_answer"),
        ("9001", "\\boxed{" + "1+" * 9000 + "1}", "ok"),
        ("42", "\\boxed{" + "\\frac{" * 3000 + "}", "format"),
        ("42", "\\boxed{" + "\\text{" * 300 + "42" + "}" * 300 + "}", "wrong_answer"),
        ("7", "\\boxed{9^{9^{9^9}}}", "wrong_answer"),
        ("7", "\\boxed{10^{100000!}}", "wrong_answer"),
        ("7", "\\boxed{e^{e^{e^{e^{e}}}}}", "wrong_answer"),
        ("7", "\\boxed{\\tan(10^{10^{10}})}", "wrong_answer"),
        ("7" * 4400, "\\boxed{" + "7" * 4400 + "}", "ok"),
        ("7" * 4400, "\\boxed{" + "7" * 4399 + "8}", "wrong_answer"),
        ("42", "\\boxed{\ud800}", "format"),
        ("42", "\\boxed{\\text{x\ud800y}}", "wrong_answer"),
    ],
)
def test_status(answer, text, status):
    assert verify(task(answer), text).status == status


def test_a_verdict_says_how_both_sides_were_read():
    verdict = verify(task("\\frac{3}{4}"), "so it is \\boxed{\\frac{50}{100}}")
    assert verdict.feedback == "The final answer is not right. parsed answer: 1/2"
    assert verdict.explanation == "parsed gold: 3/4; parsed answer: 1/2"
    assert verify(task("3/4"), "no idea").explanation == "parsed gold: 3/4"
    right = verify(task("3/4"), "\\boxed{0.75}")
    assert (right.feedback, right.answer) == ("", "3/4")
    long = verify(task("1"), f"\\boxed{{{'7' * 900}}}")
    assert len(long.feedback) < 300


@pytest.mark.parametrize(
    ("text", "shown"),
    [("(1,\\frac{4}{2})", "(1, 2)"), ("\\{\\frac{4}{2}, 1\\}", "{2, 1}"), ("0.5\\text{ metres}", "1/2 m")],
)
def test_an_answer_is_shown_as_it_was_read(text, shown):
    assert judge("1", f"\\boxed{{{text}}}").answer == shown


def test_no_prompt_holds_the_tasks_answer():
    prompts = ChatPrompts(load_tokenizer(ModelConfig(path="tiny_exam")))
    secret = "736154"
    for text in ("\\boxed{11}", "\\boxed{736155}", "\\boxed{11\\text{ m}}", "no idea", "\\boxed{9^{9^{9^9}}}"):
        verdict = verify(task(f"{secret}.0"), text)
        assert secret in verdict.explanation
        failed = Rollout("r", "g", "t", (), Completion((1,), (-1.0,), text, "stop", 0), verdict)
        passed = Rollout(
            "s", "g", "t", (), Completion((1,), (-1.0,), "I know it.", "stop", 0), Verdict(1.0, True, "ok")
        )
        shown = [prompts.teacher(task(secret), [], None, failed), *prompts.reflection(task(secret), [failed, passed])]
        assert len(shown) == 2
        for ids in shown:
            decoded = prompts.tokenizer.decode(ids)
            assert verdict.feedback in decoded
            assert secret not in decoded


def test_inspect_shows_the_explanation():
    tokenizer, printed = load_tokenizer(ModelConfig(path="tiny_exam")), io.StringIO()
    console = Console(file=printed, width=200)
    verdict = verify(task("736154"), "\\boxed{11}")
    completion, context = Completion((1,), (-1.0,), "11", "stop", 0), TeacherContext("r", (1,))
    example = Example(Rollout("r", "g", "t", (1,), completion, verdict), 0.0, context)
    show(_describe(example), "step 1", tokenizer, console, every_token=False)
    assert "explanation  parsed gold: 736154; parsed answer: 11" in printed.getvalue()


BAD_GOLDS = {
    "NaN": "is no number", "\\frac{1}{": "cannot be read", "\\frac{1}{0}": "has no value",
    "9" * 10_001: "10,001 characters", "9^{9^{9^9}}": "too large", "???": "neither mathematics nor words",
    "\\sin(10^{200})": "too large", "\\alpha \\times": "cannot be read",
    "19_8": "cannot be read", "1 = 2": "cannot be read",
    "so there is " + "no " * 12 + "answer": "more than 12 words", "\\boxed{}": "neither mathematics nor words",
}  # fmt: skip
GOOD_GOLDS = [
    "1/2", "x = 5", "\\text{Yes}", "both A and B", "\\infty", "2:3", "12:30", "\\angle ABC",
    "x \\equiv 3 \\pmod{7}", "a > b", "\\$5.00", "The answer is $\\frac12$.", "6 * 3 = 18\n#### 18",
    "$(1, 2)$", "[1, 2)", "\u7b54\u6848", "f'(x) = 2x", "5",
]  # fmt: skip


@pytest.mark.parametrize(("gold", "words"), BAD_GOLDS.items(), ids=[gold[:20] for gold in BAD_GOLDS])
def test_an_answer_that_cannot_be_judged_has_a_reason(gold, words):
    assert words in (gold_problem(gold) or "")


def test_answers_that_cannot_be_judged_are_refused_with_their_place(tmp_path, capsys):
    file, completions = tmp_path / "t.jsonl", tmp_path / "c.jsonl"
    rows = [
        {"id": str(n), "prompt": "Q?", "verifier": "math", "answer": a} for n, a in enumerate([*GOOD_GOLDS, *BAD_GOLDS])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    completions.write_text('{"id": "0", "completion": "1"}\n')
    tasks, problems = read_task_file(str(file), "train", DataConfig())
    assert problems == []
    with pytest.raises(ConfigError) as error:
        prepare_verifiers(tasks, "strongest")
    assert main([f"--tasks={file}", f"--completions={completions}", f"--out={tmp_path / 'v'}"]) == 2
    assert not (tmp_path / "v").exists()
    for printed in (str(error.value), capsys.readouterr().err):
        lines = [line for line in printed.splitlines() if "t.jsonl" in line]
        assert len(lines) == len(BAD_GOLDS)
        for number, (line, words) in enumerate(zip(lines, BAD_GOLDS.values(), strict=True), start=len(GOOD_GOLDS) + 1):
            assert f"t.jsonl:{number}: answer=" in line
            assert words in line
            assert "use verifier `exact`" in line


def test_tasks_that_come_from_no_file_are_named_by_id():
    with pytest.raises(ConfigError, match='task "t": answer="NaN": is no number'):
        prepare_verifiers([task("NaN")], "strongest")


PIECES = [
    "1 ",
    "$",
    "\\boxed{",
    "(",
    "\\text{a} ",
    "a, ",
    "1,",
    "\\frac",
    "**",
    "{",
    "-",
    "1e5 ",
    "|",
    "x^",
    "a ",
    "\\pm ",
]


@pytest.mark.parametrize("piece", PIECES)
def test_no_long_text_takes_long(piece):
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    judge("1", text)
    judge("1", f"\\boxed{{{text}}}")
    assert time.process_time() - started < 5  # of processor time; a helper has 10 s for each
