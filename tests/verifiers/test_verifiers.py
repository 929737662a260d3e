"""Every verifier: what counts as right, what feedback says, and how the math helper starts and ends."""

import os
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from child_processes import all_end, start

from pmd.config.schema import DataConfig
from pmd.tasks import load_tasks
from pmd.types import Message, Task, Verdict
from pmd.verifiers.math import WORKER, MathWorker, verify_math
from pmd.verifiers.pool import verify
from pmd.verifiers.resolve import describe_verifier_problem


def task(verifier, answer, prompt="Q?\n\nA: one\nB: two\nC: three\nD: four\nPlease reason step by step."):
    return Task("t", (Message("user", prompt),), verifier, "train", answer=answer)


def reference(answer, text):
    """SDPO's rule, written independently."""
    start = text.rfind("<answer>")
    tail = text if start < 0 else text[start + len("<answer>") :]
    end = tail.find("</answer>")
    return 1.0 if (tail if end < 0 else tail[:end]).strip() == answer else 0.0


def test_multiple_choice_follows_sdpos_rule_on_every_question(data_folder):
    domains = ["biology", "chemistry", "material", "physics"]
    tasks = load_tasks(DataConfig(task="sciknoweval", path=str(data_folder), domains=domains), seed=0)
    everything = tasks["train"] + tasks["test"]
    assert len(everything) == 4335
    for one in everything:
        wrong = "A" if one.answer != "A" else "B"
        for text, reward in [
            (f"<reasoning>x</reasoning>\n<answer>\n{one.answer}\n</answer>", 1.0),
            (f"<answer>{wrong}</answer>", 0.0),
            (one.answer, 1.0),
            (f"I say {one.answer}", 0.0),
            (f"<answer>{one.answer}", 1.0),
            (f"<answer>{wrong}</answer> no: <answer>{one.answer}</answer>", 1.0),
            (f"<answer>{one.answer}</answer> no: <answer>{wrong}</answer>", 0.0),
            (f"<answer>{one.answer}</answer>{wrong}</answer>", 1.0),
            (f"<answer>{one.answer.lower()}</answer>", 0.0),
            (f"<answer>{one.answer}.</answer>", 0.0),
        ]:
            verdict = verify(one, text)
            assert verdict.reward == reward == reference(one.answer, text)
            assert verdict.correct == (reward == 1.0)
            assert one.answer not in verdict.feedback


@pytest.mark.parametrize(
    ("text", "status", "answer"),
    [
        ("<answer>B</answer>", "ok", "B"),
        ("<answer>A</answer>", "wrong_answer", "A"),
        ("<answer>E</answer>", "format", None),
        ("<answer></answer>", "format", None),
        ("<answer>\N{FULLWIDTH LATIN CAPITAL LETTER B}</answer>", "format", None),
        ("<answer>B <answer>", "format", None),
        ("", "format", None),
    ],
)
def test_mcq_status_and_extracted_answer(text, status, answer):
    verdict = verify(task("mcq", "B"), text)
    assert (verdict.status, verdict.answer) == (status, answer)


def test_exact():
    assert verify(task("exact", " blue whale\n"), "thinking <answer>blue whale</answer>").correct
    assert verify(task("exact", "blue whale"), "blue whale ").correct
    assert verify(task("exact", "blue whale"), "Blue whale").status == "wrong_answer"
    assert verify(task("exact", "blue whale"), " ").status == "format"


FEEDBACK = {"", "The final answer is not right.", "No mathematical answer was found; put it into \\boxed{}."}


@pytest.mark.parametrize(
    ("answer", "text", "status"),
    [
        ("1/2", "so \\boxed{0.5}", "ok"),
        ("\\frac{1}{2}", "<answer>$\\frac{2}{4}$</answer>", "ok"),
        ("42", "first 7, then \\boxed{42}", "ok"),
        ("42", "\\boxed{41}", "wrong_answer"),
        ("42", "no idea", "format"),
        ("$x^2+1$", "\\boxed{1+x^2}", "ok"),
        ("42", "\\boxed{" + "(" * 3000 + "42", None),
        # an answer is parsed whole, not as the first number in it
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", "ok"),
        ("2\\sqrt{3}", "\\boxed{2}", "wrong_answer"),
        ("2", "<answer>2\\sqrt{3}</answer>", "wrong_answer"),
        ("2\\pi", "<answer>2\\pi</answer>", "ok"),
        ("2^{100}", "\\boxed{1267650600228229401496703205376}", "ok"),
        ("3+4i", "\\boxed{3}", "wrong_answer"),
        ("5!", "\\boxed{120}", "ok"),
        ("50\\%", "\\boxed{0.5}", "ok"),
        ("1 1/2", "\\boxed{1}", "wrong_answer"),
        ("1 1/2", "\\boxed{1.5}", "ok"),
        ("12 dollars", "\\boxed{12 dollars}", "ok"),
        # small numbers differ too
        ("1.6 \\times 10^{-19}", "\\boxed{3.2 \\times 10^{-19}}", "wrong_answer"),
        ("1.6 \\times 10^{-19}", "\\boxed{1.6e-19}", "ok"),
        ("10^{-20}", "\\boxed{10^{-21}}", "wrong_answer"),
        ("0.0000001", "\\boxed{0.0000002}", "wrong_answer"),
        ("0.0000001", "\\boxed{10^{-7}}", "ok"),
        ("\\sqrt{2}-\\sqrt{2}", "\\boxed{0}", "ok"),
        ("1500", "\\boxed{1.5e3}", "ok"),
        ("0.\\overline{3}", "\\boxed{1/3}", "ok"),
        ("0.\\overline{3}", "\\boxed{0}", "wrong_answer"),
        ("2.1\\overline{36}", "\\boxed{\\frac{47}{22}}", "ok"),
        # of several boxes the last one counts, unless together they are one answer
        ("42", "\\boxed{41}. Wait, \\boxed{42}", "ok"),
        ("42", "<think>\\boxed{41}</think> \\boxed{42}", "ok"),
        ("41", "\\boxed{41}. Wait, \\boxed{42}", "wrong_answer"),
        ("6", "\\boxed{\\frac{1}{5}} or \\boxed{6}", "wrong_answer"),
        ("6", "\\boxed{5}, $\\quad$ \\boxed{6}", "wrong_answer"),
        ("1, 2", "$x=\\boxed{1}$ and $x=\\boxed{2}$", "ok"),
    ],
)
def test_math(answer, text, status):
    verdict = verify(task("math", answer), text)
    assert verdict.status != "error"
    if status:
        assert verdict.status == status
    assert verdict.feedback in FEEDBACK


def test_a_hanging_math_helper_is_replaced_for_the_next_answer():
    worker = MathWorker(deadline_s=1.0)
    assert worker.ask({"gold": "1", "text": "$9^{9^{9^{9}}}$"}) is None
    assert worker.ask({"gold": "1", "text": "\\boxed{1}"}) == {"correct": True, "answer": "1"}
    worker.close()


def test_the_math_helper_can_be_closed_in_the_middle_of_a_question():
    worker, ended = MathWorker(deadline_s=3600), []
    assert worker.ask({"gold": "1", "text": "1"})
    running = worker.process

    def ask() -> None:
        with pytest.raises(RuntimeError, match="the math-verify helper"):
            worker.ask({"gold": "1", "text": "$9^{9^{9^{9}}}$"})
        ended.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    while not worker.lock.locked():
        time.sleep(0.01)
    worker.close()
    thread.join(60)
    assert ended == [True]
    assert running
    assert running.returncode == -signal.SIGKILL


def test_math_works_in_threads():
    verdicts = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(verify_math(task("math", str(n)), f"\\boxed{{{n}}}")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.correct for verdict in verdicts] == [True] * 4


def test_closing_ends_the_math_helper():
    verify(task("math", "1"), "\\boxed{1}")
    process = WORKER.process
    assert process
    WORKER.close()
    assert process.returncode is not None


COMPUTING = """
import threading, time
from pmd.verifiers.math import MathWorker
worker = MathWorker(deadline_s=3600)
worker.ask({"gold": "1", "text": "1"})
print(worker.process.pid, flush=True)
worker.ask({"gold": "1", "text": "$9^{9^{9^{9}}}$"})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_math_helper_ends_while_computing_if_its_trainer_is_killed(number):
    trainer = start([sys.executable, "-c", COMPUTING], stdout=subprocess.PIPE)
    assert trainer.stdout
    helper = os.pidfd_open(int(trainer.stdout.readline()))
    assert not select.select([helper], [], [], 0.5)[0]  # in C code, where none of its own Python code can run
    trainer.send_signal(number)
    trainer.wait(20)
    assert all_end([helper])
    trainer.stdout.close()


def test_a_math_helper_whose_trainer_is_gone_does_not_start():
    reading, writing = os.pipe()
    os.close(writing)
    command = [sys.executable, "-m", "pmd.verifiers.math_worker", str(reading)]
    done = subprocess.run(
        command, pass_fds=[reading], stdin=subprocess.PIPE, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b""  # not "ready"
    os.close(reading)


def crash(task: Task, completion: str) -> Verdict:
    raise RecursionError("deep")


def no_verdict(task: Task, completion: str) -> bool:
    return True


def numpy_verdict(task: Task, completion: str) -> Verdict:
    return Verdict(np.float32(0.5), np.bool_(1), "ok")  # type: ignore[arg-type]


INVALID = {
    "reward": Verdict(float("nan"), True, "ok"),
    "text as reward": Verdict("1", True, "ok"),  # type: ignore[arg-type]
    "status": Verdict(1.0, True, "fine"),  # type: ignore[arg-type]
    "feedback": Verdict(1.0, True, "ok", None),  # type: ignore[arg-type]
    "answer": Verdict(1.0, True, "ok", answer=3),  # type: ignore[arg-type]
    "half a character in the feedback": Verdict(0.0, False, "wrong_answer", feedback="printed \udcff"),
    "half a character in the answer": Verdict(1.0, True, "ok", answer="\ud83d"),
}


def invalid(task: Task, completion: str) -> Verdict:
    return INVALID[completion]


class Length:
    def __call__(self, task: Task, completion: str) -> Verdict:
        return Verdict(float(len(completion)), True, "ok")


def test_custom_verifiers():
    assert verify(task(f"{__name__}.Length", ""), "abc").reward == 3.0
    for name in ("crash", "no_verdict"):
        verdict = verify(task(f"{__name__}.{name}", ""), "abc")
        assert (verdict.status, verdict.scored, verdict.correct) == ("error", False, False)
    for completion in INVALID:
        assert verify(task(f"{__name__}.invalid", ""), completion).status == "error"
    verdict = verify(task(f"{__name__}.numpy_verdict", ""), "abc")
    assert (type(verdict.reward), verdict.reward, verdict.correct) == (float, 0.5, True)
    assert verify(task("mcq", "A"), "A").seconds > 0


def test_verifier_names_are_checked():
    assert describe_verifier_problem("mcq") is None
    assert describe_verifier_problem(f"{__name__}.Length") is None
    assert "must be mcq" in (describe_verifier_problem("guess") or "")
    assert "cannot be loaded" in (describe_verifier_problem("no.such.Thing") or "")
    assert "must take" in (describe_verifier_problem("math.pi") or "")


def test_a_verifier_whose_module_exits_the_program_is_refused(tmp_path, monkeypatch):
    (tmp_path / "module_that_ends.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "cannot be loaded (SystemExit" in (describe_verifier_problem("module_that_ends.Any") or "")
