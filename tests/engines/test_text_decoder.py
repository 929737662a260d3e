"""What verifiers read of a completion: tags that are special tokens stay, ends and turns do not, in every engine."""

import pytest

from pmd.bootstrap.random_model import make_random_model
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import HFEngine, TextDecoder
from pmd.engines.vllm import to_completion
from pmd.engines.vllm_runtime import RawCompletion
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer
from pmd.types import Message, Task
from pmd.verifiers.pool import verify

TAGS = ["<answer>", "</answer>", "<think>", "</think>", "[THINK]", "<tool_call>", "<|channel|>", "<|message|>"]
CONTROL = ["<|im_start|>", "<|vision_start|>", "<turn>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose tokenizer has the tags and more control tokens as special tokens."""
    folder = make_random_model(tmp_path_factory.mktemp("models") / "model", "qwen3")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL, *TAGS]})
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n", "assistant\\n<turn>")
    tokenizer.save_pretrained(folder)
    base = load_base(ModelConfig(path=str(folder)))
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def texts(model, text):
    """Return the text of a completion from either engine."""
    tokenizer = load_tokenizer(model)
    engine = HFEngine(make_policy(load_base(model), model, TeacherConfig()), tokenizer, 1)
    ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    raw = RawCompletion(0, ids, (0.0,) * len(ids), "stop")
    decode = TextDecoder(tokenizer, tuple(engine.stop_ids))
    completion = to_completion(raw, Sampling(1.0, 99), decode, engine.stop_ids, 0)
    return {engine._completion(Request((1,), 0), list(ids), [0.0] * len(ids)).text, completion.text}


def test_tags_that_are_special_tokens_stay_readable(model):
    text = "<think>maybe A</think><answer>B</answer> [THINK]<tool_call><|channel|>a<|message|>"
    assert texts(model, text) == {text}
    (decoded,) = texts(model, "<think>maybe A</think><answer>B</answer>")
    question = Message("user", "Q?\n\nA: one\nB: two")
    assert verify(Task("t", (question,), "mcq", "test", answer="B"), decoded).status == "ok"


def test_ends_padding_and_turns_are_dropped(model):
    tokenizer = load_tokenizer(model)
    text = f"a<|im_start|>b<turn>c<|vision_start|>{tokenizer.pad_token}d"
    assert texts(model, text) == {"abcd"}


def test_a_prompt_that_opens_the_thinking_is_remembered(model):
    tokenizer = load_tokenizer(model)
    decode = TextDecoder(tokenizer, (tokenizer.eos_token_id,))
    opening, closed = (
        tokenizer.encode(f"x{end}", add_special_tokens=False) for end in ("<think>\n", "<think></think>")
    )
    ids = tokenizer.encode("maybe <answer>B</answer>", add_special_tokens=False)
    assert decode([*ids, tokenizer.eos_token_id], opening) == "<think>maybe <answer>B</answer>"
    assert decode(ids, closed) == decode(ids) == "maybe <answer>B</answer>"
    task = Task("t", (Message("user", "Q?\n\nA: one\nB: two"),), "mcq", "test", answer="B")
    assert verify(task, decode(ids, opening)).status == "format"
    answer = tokenizer.encode("C?</think><answer>B</answer>", add_special_tokens=False)
    assert verify(task, decode(answer, opening)).correct


def test_the_engine_looks_at_each_requests_own_prompt(model):
    tokenizer = load_tokenizer(model)
    engine = HFEngine(make_policy(load_base(model), model, TeacherConfig()), tokenizer, 2)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("Hello: <think>\n", "Hello: long text")]
    requests = [Request(tuple(ids), 0) for ids in prompts]
    texts = dict(engine.generate(requests, Sampling(1.0, 2)))
    assert [texts[n].text.startswith("<think>") for n in (0, 1)] == [True, False]
