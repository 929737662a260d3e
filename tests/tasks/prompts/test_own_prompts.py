"""Prompts as the user wants them: a template of one's own, its arguments by role, edited texts; and a preview."""

import pytest

from pmd.cli import main
from pmd.config.schema import DataConfig, ModelConfig, PromptsConfig, RunConfig
from pmd.pretrained import load_tokenizer
from pmd.tasks import load_tasks
from pmd.tasks.prompts import make_prompts
from pmd.tasks.prompts.check import describe_prompt_problems
from pmd.tasks.prompts.examples import example_prompts
from pmd.tasks.prompts.texts import export_texts
from pmd.types import Message, Task

TASK = Task("t", (Message("user", "2 + 2?"),), "exact", "train", answer="4")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{{ 'THINK' if enable_thinking else 'PLAIN' }}{{ mood }}"
)


@pytest.fixture
def template(tmp_path) -> str:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    return str(tmp_path / "mine.jinja")


def texts_of(run: RunConfig) -> dict[str, str]:
    tokenizer = load_tokenizer(run.model)
    return {
        name: str(tokenizer.decode(ids)) for name, ids in example_prompts(make_prompts(run, tokenizer), TASK).items()
    }


def run_with(folder=None, **model) -> RunConfig:
    return RunConfig(model=ModelConfig(path="tiny_exam", prompts="chat", **model), prompts=PromptsConfig(folder))


def test_a_template_of_ones_own_gets_its_arguments_by_role(template):
    found = texts_of(run_with(chat_template=template))
    assert found["student"] == "<|im_start|>2 + 2?<|im_end|>PLAIN"
    kwargs = {"mood": "!", "enable_thinking": True, "teacher": {"enable_thinking": False}, "reflection": {"mood": "?"}}
    found = texts_of(run_with(chat_template=template, chat_template_kwargs=kwargs))
    endings = {"student": "THINK!", "teacher": "PLAIN!", "reflection": "THINK?", "abstraction": "THINK?"}
    for name, text in found.items():
        assert text.endswith(endings[name.split(" ")[0]]), name


def test_a_teacher_that_is_shown_nothing_gets_the_teachers_arguments(template):
    run = run_with(chat_template=template, chat_template_kwargs={"teacher": {"mood": "!"}})
    tokenizer = load_tokenizer(run.model)
    prompts = make_prompts(run, tokenizer)
    assert tokenizer.decode(prompts.teacher(TASK, [], None, None)).endswith("PLAIN!")
    assert tokenizer.decode(prompts.student(TASK)).endswith("PLAIN")


def test_edited_texts_are_used_and_the_rest_stays(tmp_path):
    export_texts(tmp_path)
    for path in tmp_path.glob("*.txt"):
        if path.stem != "teacher":
            path.unlink()
    (tmp_path / "teacher.txt").write_text("{sections}\nNow: {question}\n")
    assert describe_prompt_problems(run_with(str(tmp_path))) == []
    before, after = texts_of(run_with()), texts_of(run_with(str(tmp_path)))
    assert "Now: 2 + 2?" in after["teacher with memory"]
    assert {name for name in before if before[name] != after[name]} == {
        "teacher with memory", "teacher with a success", "teacher with a failure", "teacher",
    }  # fmt: skip


def test_export_keeps_what_was_edited(tmp_path, capsys):
    (tmp_path / "memory.txt").write_text("mine {items}")
    assert main(["prompts", "export", str(tmp_path)]) == 0
    assert (tmp_path / "memory.txt").read_text() == "mine {items}"
    assert len(list(tmp_path.glob("*.txt"))) == 11
    assert "10 texts" in capsys.readouterr().out


def test_mistakes_are_named_all_at_once(tmp_path):
    (tmp_path / "reflection.txt").write_text("{question} {outcom}")
    (tmp_path / "notes.md").write_text("")
    run = run_with(str(tmp_path), chat_template="nope.jinja", chat_template_kwargs={"student": 3, "tokenize": True})
    said = "\n".join(describe_prompt_problems(run))
    for words in ("reflection.txt must hold", "{outcom}", "{attempts}", "notes.md is no prompt", "nope.jinja is not a",
                  "kwargs.student=3 must be a mapping", "kwargs.tokenize is set by pmd"):  # fmt: skip
        assert words in said
    words_run = RunConfig(prompts=PromptsConfig("nowhere"))
    assert len(describe_prompt_problems(words_run)) == 2


def test_the_preview_shows_every_kind_and_the_edited_text(tmp_path, capsys):
    export_texts(tmp_path)
    (tmp_path / "memory.txt").write_text("\nMY NOTES\n{items}\n")
    config = "configs/tiny_sciknoweval.yaml"
    rows = "".join(f'{{"prompt": "{n} + 1?", "answer": "{n + 1}", "verifier": "exact"}}\n' for n in range(20))
    (tmp_path.parent / "tasks.jsonl").write_text(rows)
    data = ["--data.task=jsonl", f"--data.path={tmp_path.parent / 'tasks.jsonl'}"]
    assert main(["inspect", "prompts", "--config", config, *data, f"--prompts.folder={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert said.count("MY NOTES") == 2
    for name in ("student", "teacher with a failure", "reflection that may revise", "abstraction"):
        assert f"{name}, " in said
    assert main(["inspect", "prompts", "--config", config, *data, "--task", "nope"]) == 2
    assert "--list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "model", "language"), [("tiny", "tiny", "words"), ("tiny_hard", "tiny_hard", "hard_words")]
)
def test_the_tiny_worlds_have_a_preview_too(task, model, language):
    run = RunConfig(model=ModelConfig(path=model, prompts=language), data=DataConfig(task=task))
    found = example_prompts(make_prompts(run, load_tokenizer(run.model)), load_tasks(run.data, 0)["train"][0])
    assert len(found) == 8
    assert all(found.values())
    assert len(found["student"]) < len(found["teacher with a failure"])
