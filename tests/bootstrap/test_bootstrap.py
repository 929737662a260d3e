"""Making the shipped models: exact labels, the loss, and a command that refuses to write bad models."""

import math
import random
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from pmd.bootstrap.catalogue import find_blueprint
from pmd.bootstrap.command import main
from pmd.bootstrap.exam_probes import EXAM, FENCED
from pmd.bootstrap.exam_samples import exam_prompt
from pmd.bootstrap.exam_tokenizer import END_ID, END_OF_TEXT_ID, VOCABULARY_SIZE, make_exam_tokenizer
from pmd.bootstrap.muon import Muon, orthogonalised
from pmd.bootstrap.sample import Sample
from pmd.bootstrap.ship import write_model
from pmd.bootstrap.tiny_model import make_tiny_model
from pmd.bootstrap.tiny_samples import Difficulty, draw_sample, encode_words
from pmd.bootstrap.tiny_tokenizer import make_tokenizer
from pmd.bootstrap.train import batch_loss, train
from pmd.tasks.prompts.words import VOCABULARY, parse_line
from pmd.tiny.world import ALL_RULES, NAMES


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_labels_follow_from_the_memory_in_the_prompt():
    draw = random.Random(0)
    checked = 0
    for _ in range(600):
        sample = draw_sample(draw, Difficulty.at(1.0))
        words = [VOCABULARY[token] for token in sample.ids]
        if "memory" not in words[:2]:
            continue
        shown = {c for c in words[words.index("task") :] if c in ("pink", "grey")}
        rules = [rule for rule in ALL_RULES if shown or not ({"pink", "grey"} & set(rule.split(">")))]
        text = " ".join(words[2 : words.index("task")])
        lines = [line for part in text.split(" .") if (line := parse_line(part)) is not None]
        for position, allowed in sample.uniform_over.items():
            about = [line for line in lines if line.name == words[position - 1]]
            stated = {line.rule for line in about if " use " in line.text}
            excluded = {line.rule for line in about if " not " in line.text}
            expected = stated or set(rules) - excluded
            assert {VOCABULARY[token] for token in allowed} == expected
            assert sample.ids[position] in allowed
            checked += 1
    assert checked > 300


def test_the_loss_is_zero_at_the_exact_distribution_and_kl_elsewhere():
    class Constant(torch.nn.Module):
        """Returns the same logits everywhere."""

        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def model(self, input_ids, use_cache):
            return BaseModelOutput(last_hidden_state=torch.zeros(*input_ids.shape, 1))

        def lm_head(self, hidden):
            return self.logits.expand(hidden.shape[0], -1)

    sample = Sample(encode_words).show("<bos> task").learn_choice("1", ("1", "2"), weight=3.0)
    one, two = VOCABULARY.index("1"), VOCABULARY.index("2")
    even = torch.full((len(VOCABULARY),), -math.inf)
    even[[one, two]] = 0.0
    even = even.clamp(min=-1e4)
    assert batch_loss(Constant(even), [sample]).item() == pytest.approx(0.0, abs=1e-6)
    skewed = even.clone()
    skewed[one] = math.log(3.0)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert batch_loss(Constant(skewed), [sample]).item() == pytest.approx(expected, abs=1e-5)


def test_padding_and_order_do_not_change_the_loss():
    draw = random.Random(1)
    samples = [draw_sample(draw, Difficulty.at(1.0)) for _ in range(6)]
    model = make_tiny_model(0)
    together = batch_loss(model, samples)
    assert batch_loss(model, samples[::-1]).item() == pytest.approx(together.item(), rel=1e-5)
    weights = [sum(sample.weights.values()) for sample in samples]
    alone = sum(w * batch_loss(model, [s]) for w, s in zip(weights, samples, strict=True)) / sum(weights)
    assert alone.item() == pytest.approx(together.item(), rel=1e-4)


def test_muon_updates_are_nearly_orthogonal():
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonalised([torch.randn(16, 64)])[0])
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.5
    tall = torch.nn.Parameter(torch.zeros(64, 16))
    tall.grad = torch.randn(64, 16)
    Muon([tall], lr=0.1).step()
    assert torch.linalg.svdvals(tall.detach()).max() == pytest.approx(0.1 * 2, rel=0.5)


def test_the_same_seed_makes_the_same_model():
    first, second = three_steps(seed=3), three_steps(seed=3)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def three_steps(seed):
    blueprint = find_blueprint("tiny")
    model, losses = blueprint.make_model(seed), []
    recipe = replace(blueprint.recipe, steps=3, pool=64)
    train(model, blueprint.draw_sample, recipe, seed, lambda step, loss: losses.append((step, loss)))
    return losses, model.state_dict()


def test_the_large_model_has_another_size_and_the_same_vocabulary():
    small, large = (find_blueprint(name) for name in ("tiny", "tiny_large"))
    sizes = [sum(p.numel() for p in blueprint.make_model(0).parameters()) for blueprint in (small, large)]
    assert sizes[1] > 1.9 * sizes[0]
    assert small.make_tokenizer().get_vocab() == large.make_tokenizer().get_vocab()
    model = large.make_model(0)
    train(model, large.draw_sample, replace(large.recipe, steps=1, pool=64), 0, lambda step, loss: None)
    ids = torch.tensor([encode_words(f"<bos> task red 3 blue 5 green 1 gold 7 plan {NAMES[0]}")])
    assert model(ids).logits.isfinite().all()


def test_samples_of_the_exam_answer_as_the_probes_demand():
    blueprint, draw, seen = find_blueprint("tiny_exam"), random.Random(0), set()
    tokenizer, whole = blueprint.make_tokenizer(), 0
    for _ in range(20):
        sample = blueprint.draw_sample(draw, 0.5)
        for position, allowed in sample.uniform_over.items():
            assert tokenizer.decode(list(allowed)) == "ABCD"
            assert sample.weights[position] > 1  # never corrupted
            seen.add(sample.ids[position])
            assert sample.ids[position] in allowed
        answers = re.findall(r"assistant\n(.*?)<\|im_end\|>\n", tokenizer.decode(sample.ids), re.DOTALL)
        whole += sum(bool(EXAM.fullmatch(answer) or FENCED.fullmatch(answer)) for answer in answers)
    assert len(seen) == 4
    assert whole > 50  # of 80; the others have a wrong byte, from which the model learns to recover


def test_a_model_that_fails_its_probes_is_not_written(tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["--model", "tiny", "--steps", "2", "--probe-samples", "15", "--out", str(out)]) == 1
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in " ".join(capsys.readouterr().out.split())


def test_a_directory_that_contains_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["--steps", "1", "--out", str(tmp_path)]) == 1
    assert "thesis.tex" in capsys.readouterr().out
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_written_model_is_a_plain_hugging_face_directory(tmp_path):
    for seed in (0, 1):  # the second replaces the first
        write_model(make_tiny_model(seed), make_tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    expected = make_tiny_model(1).to(torch.bfloat16).state_dict()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in expected.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<eos>"


def test_the_exam_tokenizer_is_bytes(tmp_path):
    tokenizer = make_exam_tokenizer()
    text = "µ ö <|im_start|>user\n$x^2$  two spaces .<|im_end|>"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.replace("<|im_start|>", "s").replace("<|im_end|>", "e").encode())
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (VOCABULARY_SIZE, END_OF_TEXT_ID, END_ID)
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Why?"}]
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert rendered == exam_prompt("be brief", [], "Why?")
