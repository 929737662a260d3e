"""Models and tokenizers that cannot serve are refused in words before anything is generated; dropout is off."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pmd.bootstrap.random_model import make_random_model
from pmd.cli.run import build
from pmd.config.schema import DataConfig, ModelConfig, ReflectionConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.errors import ConfigError
from pmd.model_check import check_pretrained, fit_to_positions, max_positions
from pmd.policy import make_policy
from pmd.pretrained import describe_noise, load_base, load_model_config, load_tokenizer
from pmd.run_dir import RunDir
from pmd.types import Message, Task

TASKS = [
    Task("plain", (Message("user", "2 + 2?"),), "exact", "train"),
    Task("briefed", (Message("system", "Be brief."), Message("user", "2 + 2?")), "exact", "train"),
]
SIZES = {"vocab_size": 259, "eos_token_id": 258, "pad_token_id": 256, "bos_token_id": None}
GPT2 = SIZES | {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
GEMMA2 = SIZES | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(path: Path, **changes):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (fields | changes).items() if v is not None}))


def use_template(folder: Path, text: str):
    (folder / "chat_template.jinja").write_text(text)


def run_with(folder: Path) -> RunConfig:
    return RunConfig(model=ModelConfig(path=str(folder), prompts="chat"))


def problems_of(folder: Path, tasks=TASKS) -> list[str]:
    run = run_with(folder)
    problems = []
    try:
        check_pretrained(run, load_model_config(run.model), load_tokenizer(run.model), tasks)
    except ConfigError as error:
        problems = error.problems
    assert all(f"model.path={folder}" in problem or problem.startswith("model: ") for problem in problems), problems
    return problems


def no_end(folder):
    edit(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=None, pad_token_id=None)


def end_out_of_reach(folder):
    edit(folder / "tokenizer_config.json", eos_token="<|far|>", pad_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=9999)


def more_ids(*tokens, special=False):
    def change(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(tokens), special_tokens=special)
        tokenizer.save_pretrained(folder)

    return change


def other_padding(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def forgetful_tokenizer(folder):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made.save_pretrained(folder)


def template(text):
    return lambda folder: use_template(folder, text)


EACH = "{% for m in messages %}"
UNUSABLE = {
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    "no system role": (
        template(EACH + "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
                 "{{ m['content'] }}{% endfor %}"),
        "refuses messages of system, user (TemplateError: no system role)",
    ),
    "system left out": (
        template(EACH + "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"),
        "leaves out the system message",
    ),
    "nothing rendered": (template("{{ '<|im_start|>' }}"), "leaves out the user message"),
    "not a template": (template("{% for m in messages %}"), "refuses messages of user (TemplateSyntaxError"),
    "a template for other fields": (template(EACH + "{{ m['text'] + 'x' }}{% endfor %}"), "UndefinedError"),
    "no end": (no_end, "no completion would end"),
    "no padding": (no_end, "neither a padding nor an end-of-sequence token"),
    "an end out of reach": (end_out_of_reach, "no completion would end"),
    "more ids": (more_ids("What"), "ids up to 259 ('What'), but the model has embeddings for 259 only"),
    "padding out of reach": (other_padding, "ids up to 259 ('[PAD]')"),
    "a special token in the template": (
        lambda folder: (more_ids("<turn>", special=True)(folder),
                        use_template(folder, EACH + "<turn>{{ m['content'] }}{% endfor %}")),
        "ids up to 259 ('<turn>')",
    ),
    "a forgetful tokenizer": (forgetful_tokenizer, "its tokenizer turns"),
    "masked": (lambda folder: edit(folder / "config.json", architectures=["BertForMaskedLM"]), "next token"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_serve_is_refused(folder, name):
    change, words = UNUSABLE[name]
    change(folder)
    assert any(words in problem for problem in problems_of(folder)), problems_of(folder)


def test_a_usable_model_is_accepted(folder):
    assert problems_of(folder) == []


def test_a_system_role_is_needed_only_by_tasks_that_have_one(folder):
    UNUSABLE["no system role"][0](folder)
    assert problems_of(folder, TASKS[:1]) == []


def test_special_tokens_without_a_row_are_harmless_where_nothing_is_encoded_to_them(folder):
    more_ids("<image_soft_token>", special=True)(folder)
    assert problems_of(folder) == []


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_capped_logits_are_refused_and_capped_attention_is_not(folder, setting):
    off = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    AutoConfig.for_model("gemma2", **GEMMA2, **off | {setting: 30.0}).save_pretrained(folder)
    assert [setting in problem for problem in problems_of(folder)] == [True] * (setting == "final_logit_softcapping")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 64),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
    ],
)
def test_positions(fields, expected):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
    assert max_positions(AutoConfig.for_model("qwen3", **shape, **fields)) == expected
    assert max_positions(AutoConfig.for_model("gpt2", n_positions=32)) == 32
    assert max_positions(AutoConfig.for_model("mamba")) is None


def test_prompts_are_kept_within_the_models_positions():
    run = RunConfig(
        rollouts=RolloutsConfig(max_new_tokens=10), teacher=TeacherConfig(max_prompt_tokens=95),
        reflection=ReflectionConfig(max_new_tokens=20),
    )  # fmt: skip
    fitted, lines = fit_to_positions(run, 100, longest_prompt=90)
    assert (fitted.teacher.max_prompt_tokens, fitted.reflection.max_prompt_tokens) == (90, 80)
    assert fitted.longest_sequence == 100
    assert len(lines) == 1  # the reflection's limit is a default that nobody chose
    assert "teacher.max_prompt_tokens=95 counts as 90" in lines[0]
    assert run.teacher.max_prompt_tokens == 95
    assert fit_to_positions(run, None, 10**6) == (run, [])
    with pytest.raises(ConfigError, match=r"rollouts.max_new_tokens=10 after the longest prompt of 91 .* exceeds 100"):
        fit_to_positions(run, 100, longest_prompt=91)
    short, lines = fit_to_positions(run, 30, longest_prompt=5)
    assert (short.reflection.max_new_tokens, short.reflection.max_prompt_tokens) == (15, 15)
    assert any("reflection.max_new_tokens=20 counts as 15" in line for line in lines)


def test_a_run_that_does_not_fit_the_model_is_refused_before_it_is_built(folder, tmp_path):
    edit(folder / "config.json", max_position_embeddings=40)
    rows = [{"id": str(n), "prompt": f"What is {n} + {n}?", "verifier": "exact", "answer": "x"} for n in range(20)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_with(folder)
    run.data = DataConfig(task="jsonl", path=str(tmp_path / "tasks.jsonl"))
    with pytest.raises(ConfigError, match=r"positions of model.path"):
        build(run, RunDir(tmp_path / "run"))


BROKEN = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
    "other shapes": lambda folder: edit(folder / "config.json", hidden_size=32),
    "more layers": lambda folder: edit(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_weights_are_refused_in_words(folder, name):
    BROKEN[name](folder)
    with pytest.raises(ConfigError, match=f"model.path={folder}"):
        load_base(ModelConfig(path=str(folder)))


def test_damaged_configurations_and_tokenizers_are_refused_in_words(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="its tokenizer cannot be loaded"):
        load_tokenizer(ModelConfig(path=str(folder)))
    for text in ("{", "[]", '{"model_type": "nonsense"}', '{"model_type": "qwen3", "hidden_size": "wide"}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="its configuration cannot be loaded"):
            load_model_config(ModelConfig(path=str(folder)))


def test_code_of_the_models_repository_is_neither_run_nor_asked_about(folder, monkeypatch):
    code = "raise SystemExit('code of the model has run')\n"
    (folder / "modeling_own.py").write_text(code)
    (folder / "tokenization_own.py").write_text(code)
    maps = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit(folder / "config.json", model_type="own", auto_map=maps)
    tokenizer_map = {"AutoTokenizer": ["tokenization_own.T", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer_map)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on stdin"))
    for load in (load_model_config, load_base):
        with pytest.raises(ConfigError, match=r"model.trust_remote_code=true"):
            load(ModelConfig(path=str(folder)))
    with pytest.raises(SystemExit, match="code of the model has run"):
        load_model_config(ModelConfig(path=str(folder), trust_remote_code=True))


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_the_policy_that_is_trained_is_the_one_that_samples(tmp_path, finetune):
    noisy = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "n_positions": 64}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2 | noisy)).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), finetune=finetune, lora_dropout=0.0)
    assert "attn_pdrop=0.3, embd_pdrop=0.3, resid_pdrop=0.3" in describe_noise(load_model_config(config))[0]
    policy = make_policy(load_base(config), config, TeacherConfig())
    ids = torch.arange(20)[None]
    with policy.weights("student") as model:
        assert model.training
        first, again = (model(input_ids=ids).logits for _ in range(2))
        model.eval()
        torch.testing.assert_close(first, model(input_ids=ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_the_adapters_own_dropout_stays(folder):
    config = ModelConfig(path=str(folder), finetune="lora", lora_dropout=0.5)
    policy = make_policy(load_base(config), config, TeacherConfig())
    assert {m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    assert describe_noise(load_model_config(config)) == []


def test_noise_in_parts_and_of_routers_is_found():
    mixtral = AutoConfig.for_model("mixtral", router_jitter_noise=0.1, attention_dropout=0.2)
    opt = AutoConfig.for_model("opt", layerdrop=0.1, dropout=0.0)
    dbrx = AutoConfig.for_model("dbrx", resid_pdrop=0.1, attn_config={"attn_pdrop": 0.2})
    assert "attention_dropout=0.2, router_jitter_noise=0.1" in describe_noise(mixtral)[0]
    assert "layerdrop=0.1" in describe_noise(opt)[0]
    assert "attn_pdrop=0.2, resid_pdrop=0.1" in describe_noise(dbrx)[0]


def test_a_tokenizer_does_not_warn_of_long_prompts(caplog):
    """A prompt that is too long is refused or shortened."""
    tokenizer = load_tokenizer(ModelConfig(path="tiny_exam"))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(tokenizer("word " * 2000)["input_ids"]) > tokenizer.model_max_length
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than" not in caplog.text
