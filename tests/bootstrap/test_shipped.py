"""The shipped models load with plain transformers and still pass their probes."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmd.bootstrap.exam_probes import EXAM, exam_probes
from pmd.bootstrap.exam_text import noise
from pmd.bootstrap.generate import sampled
from pmd.bootstrap.tiny_probes import tiny_probes
from pmd.bootstrap.tiny_tokenizer import make_tokenizer
from pmd.tasks.prompts.chat import ChatPrompts
from pmd.tiny import SHIPPED_MODELS, shipped_model_path
from pmd.types import Completion, Message, Rollout, Task, Verdict


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name):
    return AutoModelForCausalLM.from_pretrained(shipped_model_path(name), dtype=torch.float32).eval()


def test_everything_shipped_is_small():
    sizes = [f.stat().st_size for name in SHIPPED_MODELS for f in shipped_model_path(name).rglob("*")]
    assert 0 < sum(sizes) <= 2_000_000


def test_tiny_passes_its_probes():
    probes = tiny_probes(load("tiny"), samples=100, seed=1)
    assert [f"{probe.name}: {probe.value:.4f}" for probe in probes if not probe.passed] == []


def test_the_shipped_tokenizer_is_the_one_in_the_code():
    assert AutoTokenizer.from_pretrained(shipped_model_path("tiny")).get_vocab() == make_tokenizer().get_vocab()


def test_exam_passes_its_probes():
    # Fewer samples than the command uses, so allow for their noise.
    probes = exam_probes(load("tiny_exam"), samples=15, seed=1)
    assert [f"{p.name}: {p.value:.4f}" for p in probes if not (p.passed or (p.at_least and p.value >= 0.9))] == []


# It was trained on noise; from here on it gets the product's own prompts.

REPLY = "<reasoning>\nI compare.\n</reasoning>\n<answer>\n{}\n</answer>"
QUESTION = "Which is a noble gas?\n\nA: Ne\nB: $O_2$\nC: \\mathrm{N}_2\nD: Cl\nPlease reason step by step."
RIGHT = Rollout("r", "g", "t", (1,), Completion((1,), (0.0,), REPLY.format("A"), "stop", 0), Verdict(1.0, True, "ok"))
WRONG = Rollout(
    *("w", "g", "t", (1,)),
    Completion((1,), (0.0,), REPLY.format("B"), "stop", 0),
    Verdict(0.0, False, "wrong_answer", feedback="The answer is not right."),
)


@pytest.fixture(scope="module")
def exam():
    return load("tiny_exam"), ChatPrompts(AutoTokenizer.from_pretrained(shipped_model_path("tiny_exam")))


@pytest.fixture(scope="module")
def tasks():
    draw = random.Random(0)
    questions = [f"{noise(draw, 200)} {QUESTION}" for _ in range(6)]
    return [Task("t", (Message("system", noise(draw, 300)), Message("user", q)), "mcq", "train") for q in questions]


def written(exam, prompt_ids):
    model, prompts = exam
    return [prompts.tokenizer.decode(ids) for ids in sampled(model, prompt_ids, 160, prompts.tokenizer.eos_token_id, 0)]


def test_exam_attempts(exam, tasks):
    prompts = exam[1]
    asked = [prompts.student(task) for task in tasks]
    asked += [prompts.teacher(task, ["Read twice: slowly."], REPLY.format("C"), None) for task in tasks]
    answers = [EXAM.fullmatch(text.removesuffix("<|im_end|>")) for text in written(exam, asked)]
    assert sum(answer is not None for answer in answers) >= 11


def test_exam_reflections_name_the_kind(exam, tasks):
    prompts = exam[1]
    groups = {"strategy": [RIGHT], "lesson": [WRONG], "contrast": [RIGHT, WRONG]}
    asked = [(kind, prompts.reflection(task, group)[0]) for task in tasks for kind, group in groups.items()]
    parsed = [
        prompts.parse_reflection(text.removesuffix("<|im_end|>")) for text in written(exam, [p for _, p in asked])
    ]
    good = [[item.kind for item in reply.items] == [wanted] for (wanted, _), reply in zip(asked, parsed, strict=True)]
    assert sum(good) >= 17


def test_exam_abstractions(exam):
    prompts = exam[1]
    texts = written(exam, [prompts.abstraction(["Read twice: slowly.", "Draw it: neatly."])] * 10)
    assert sum(prompts.parse_abstraction(text.removesuffix("<|im_end|>")) is not None for text in texts) >= 9
