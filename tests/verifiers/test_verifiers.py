"""Every verifier but math and code: what counts as right, what feedback says; verifiers of one's own."""

import numpy as np
import pytest

from pmd.config.schema import DataConfig
from pmd.tasks import load_tasks
from pmd.types import Message, Task, Verdict
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
    config = DataConfig(task="sciknoweval", path=str(data_folder), domains=domains, validation_share=0)
    tasks = load_tasks(config, seed=0)
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


def crash(task: Task, completion: str) -> Verdict:
    raise RecursionError("deep")


def no_verdict(task: Task, completion: str) -> str:
    return "right"


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
    "explanation": Verdict(1.0, True, "ok", explanation=None),  # type: ignore[arg-type]
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
