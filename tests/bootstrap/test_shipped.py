"""The shipped models: they load with plain transformers and still do what they were made for."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmd.bootstrap.exam_probes import exam_probes
from pmd.bootstrap.exam_text import noise
from pmd.bootstrap.generate import greedy, sampled
from pmd.bootstrap.tiny_probes import tiny_probes
from pmd.prompts.chat import ChatPrompts
from pmd.tiny import SHIPPED_MODELS, shipped_model_path
from pmd.tiny.tokenizer import make_tokenizer
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
    probes = tiny_probes(load("tiny"), samples=200, seed=1)
    assert [f"{probe.name}: {probe.value:.4f}" for probe in probes if not probe.passed] == []


def test_the_shipped_tokenizer_is_the_one_in_the_code():
    assert AutoTokenizer.from_pretrained(shipped_model_path("tiny")).get_vocab() == make_tokenizer().get_vocab()


def test_exam_passes_its_probes():
    # Fewer samples than the command takes: allow for their noise.
    probes = exam_probes(load("tiny_exam"), samples=90, seed=1)
    assert [f"{p.name}: {p.value:.4f}" for p in probes if not (p.passed or (p.at_least and p.value > 0.93))] == []


def test_exam_model_speaks_through_the_chat_prompts():
    """The wording it was trained on is noise; here it meets the product's own prompts."""
    model, tokenizer = load("tiny_exam"), AutoTokenizer.from_pretrained(shipped_model_path("tiny_exam"))
    prompts, draw = ChatPrompts(tokenizer), random.Random(0)
    answer = "<reasoning>\nI compare the options one by one.\n</reasoning>\n<answer>\n{}\n</answer>"
    question = "Which of these is a noble gas?\n\nA: Ne\nB: $O_2$\nC: \\mathrm{N}_2\nD: Cl\nPlease reason step by step."
    tasks = [
        Task(
            "t",
            (Message("system", noise(draw, 300)), Message("user", f"{noise(draw, 200)} {question}")),
            "mcq",
            "train",
        )
        for _ in range(8)
    ]
    right = [
        Rollout("r", "g", "t", (1,), Completion((1,), (0.0,), answer.format("A"), "stop", 0), Verdict(1.0, True, "ok"))
    ]
    feedback = "The answer is not right."
    wrong = [
        Rollout(
            "w",
            "g",
            "t",
            (1,),
            Completion((1,), (0.0,), answer.format("B"), "stop", 0),
            Verdict(0.0, False, "wrong_answer", feedback),
        )
    ]
    groups = [("strategy", right), ("lesson", wrong), ("contrast", right + wrong)]
    asked = [(kind, prompts.reflection(task, group)[0]) for task in tasks for kind, group in groups]
    written = greedy(model, [ids for _, ids in asked], 160, tokenizer.eos_token_id)
    parsed = [prompts.parse_reflection(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
    good = [[kind for kind, _ in items] == [wanted] for (wanted, _), items in zip(asked, parsed, strict=True)]
    assert sum(good) >= 0.9 * len(good)
    pattern = sampled(
        model,
        [prompts.abstraction(["Read twice: slowly.", "Draw it: neatly."])] * 8,
        240,
        tokenizer.eos_token_id,
        seed=0,
    )
    assert sum(prompts.parse_abstraction(tokenizer.decode(ids)) is not None for ids in pattern) >= 7
    attempts = sampled(model, [prompts.student(task) for task in tasks] * 2, 240, tokenizer.eos_token_id, seed=0)
    assert sum("</answer><|im_end|>" in tokenizer.decode(ids) for ids in attempts) >= 15
    taught = [prompts.teacher(task, ["Read twice: slowly."], answer.format("C"), None) for task in tasks]
    attempts = sampled(model, taught, 240, tokenizer.eos_token_id, seed=0)
    assert sum("</answer><|im_end|>" in tokenizer.decode(ids) for ids in attempts) >= 7
