"""Before weights load, prompts are written and verifiers tried; what is wrong with one's own model is a sentence."""

import json
import shutil
from pathlib import Path

import pytest

from pmd.bootstrap.random_model import make_random_model
from pmd.cli import main
from pmd.cli.preflight import try_prompts, try_verifiers
from pmd.config.schema import ModelConfig, RunConfig, TeacherConfig, VerifiersConfig
from pmd.errors import ConfigError
from pmd.pretrained import load_tokenizer
from pmd.tasks.prompts import make_prompts
from pmd.types import Message, Task

OWN = """
import json, time
def always(task, completion): return 1.0
def strict(task, completion): return json.loads(completion)["right"]
def picky(task, completion): return completion.splitlines()[0] == task.answer
def leaves(task, completion):
    raise SystemExit("no API key")

def hangs(task, completion): time.sleep(5)
"""


def task(verifier: str) -> Task:
    return Task("t", (Message("user", "2 + 2?"),), verifier, "train", answer="4")


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "preflight_checks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_each_verifier_is_tried_once_on_both(own):
    tasks = [task("exact"), task("exact"), task("math"), task("preflight_checks.always")]
    warnings, report = try_verifiers(tasks, RunConfig())
    assert warnings == []
    assert report == [
        "verifier exact: format for an empty completion, ok for a plausible completion",
        "verifier math: format for an empty completion, ok for a plausible completion",
        "verifier preflight_checks.always: ok for an empty completion, ok for a plausible completion",
    ]


def test_a_verifier_that_never_answers_is_refused_and_one_that_sometimes_fails_is_named(own):
    with pytest.raises(ConfigError, match=r"preflight_checks.strict, task t: .* an empty one \(JSONDecodeError"):
        try_verifiers([task("preflight_checks.strict")], RunConfig())
    with pytest.raises(ConfigError, match=r"an empty one \(SystemExit: no API key, in preflight_checks.py, line "):
        try_verifiers([task("preflight_checks.leaves")], RunConfig())
    warnings, _ = try_verifiers([task("preflight_checks.picky")], RunConfig())
    assert len(warnings) == 1
    assert "an empty one (IndexError: list index out of range, in preflight_checks.py, line " in warnings[0]
    warnings, _ = try_verifiers([task("preflight_checks.hangs")], RunConfig(verifiers=VerifiersConfig(deadline_s=0.1)))
    assert "a plausible one (none within 0.1 s)" in warnings[0]  # slow is not wrong


def test_prompts_that_leave_no_room_are_named():
    run = RunConfig(model=ModelConfig(path="tiny_exam", prompts="chat"), teacher=TeacherConfig(max_prompt_tokens=100))
    prompts = make_prompts(run, load_tokenizer(run.model))
    warnings, report = try_prompts(run, prompts, task("exact"))
    assert ["teacher.max_prompt_tokens=100" in warning for warning in warnings] == [True]
    for name in ("student", "teacher with memory", "reflection", "abstraction"):
        assert f" {name}" in report[0]


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """Return the options of a run on 20 sums with a copy of a random model that `change` has changed."""
    root = tmp_path_factory.mktemp("preflight")
    good = make_random_model(root / "good")
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "verifier": "exact"} for n in range(20)]
    (root / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "mine.yaml").write_text("method: mine\n")

    def options(name, change):
        folder = Path(shutil.copytree(good, root / name))
        change(folder)
        return [
            "--config", str(root / "mine.yaml"), f"--model.path={folder}", "--model.prompts=chat", "--data.task=jsonl",
            f"--data.path={root / 'tasks.jsonl'}", f"--run_dir={root / name}-run", "--trainer.accelerator=cpu",
        ]  # fmt: skip

    return options


def test_check_says_what_it_tried(typed, capsys):
    assert main(["check", *typed("fine", lambda folder: None)]) == 0
    said = capsys.readouterr().out
    for words in (
        "17 train tasks",
        "verifier exact: format for an empty completion, ok for a plausible completion",
        "reflection",
        "Nothing is",
    ):
        assert words in said


WRONG = {
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999]),
        "model.safetensors is damaged",
    ),
    "foreign end": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 65}'),
        "ends what it writes with token 65",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_with_a_model_are_one_sentence_in_every_command(typed, name, capsys):
    change, words = WRONG[name]
    options = typed(name, change)
    for command in ("check", "doctor", "test", "fit"):
        assert main([command, *options]) == 2, command
        said = capsys.readouterr().err
        assert said.startswith("ConfigError: "), command
        assert words in said
        assert "Traceback" not in said
