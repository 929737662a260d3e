"""Bad input: one error with key or file and line, value, rule and remedy; exit code 2, no traceback, no torch."""

import json
import subprocess
import sys

import pytest

TINY = ["fit", "--config", "configs/tiny.yaml"]
CHAT = ["--model.path=tiny_exam", "--model.prompts=chat"]
WRITER = "--reflection.behaviour_writer"
#: What is typed after `fit --config configs/tiny.yaml`, and words that the answer must hold.
WRONG = [
    # unknown keys
    ("--memory.kk=3", ["memory.kk=3", "memory.k?"]),
    ("--memroy.k=3", ["memroy", "memory?"]),
    ("--lr=3", ["lr=3", "optimizer.lr?"]),
    ("--trainer.max_epoch=3", ["trainer.max_epoch=3", "trainer.max_epochs?"]),
    ("--=3", ["has no key"]),
    # wrong types and bounds
    ("--optimizer.lr=fast", ["optimizer.lr=fast", "a number"]),
    ("--optimizer.lr=", ["optimizer.lr=null", "a number"]),
    ("--optimizer.lr", ["--optimizer.lr needs a value"]),
    ("--optimizer.lr=-1", ["optimizer.lr=-1", "above 0"]),
    ("--memory.enabled=1", ["memory.enabled=1", "true or false"]),
    ("--memory.k=true", ["memory.k=true", "whole number"]),
    ("--memory.k.x=3", ["memory.k={'x': 3}", "whole number"]),
    ("--memory=3", ["memory=3", "section"]),
    ("--memory.levels=[3]", ["memory.levels=[3]", "one of 0, 1, 2"]),
    ("--teacher.kind=dead", ["teacher.kind=dead", "frozen, ema, live, trust_region"]),
    ("--seed_everything=-1", ["seed_everything=-1", "at least 0"]),
    ("configs/tiny.yaml", ["--config configs/tiny.yaml"]),
    ("--objective.anchor_weight=0", ["objective.anchor_weight=0 is now objective.no_context_weight; rename it."]),
    # Lightning's own section
    ("--trainer.max_epochs=0", ["trainer.max_epochs=0", "at least 1"]),
    ("--trainer.max_steps=many", ["trainer.max_steps=many", "whole number"]),
    ("--trainer.accelerator=gpuu", ["trainer.accelerator=gpuu", "cpu"]),
    ("--trainer.precision=17", ["trainer.precision=17", "bf16-mixed"]),
    ("--trainer.precision=16-mixed", ["trainer.precision=16-mixed", "bf16-mixed"]),
    ("--trainer.precision=bf16-true", ["trainer.precision=bf16-true", "model.dtype"]),
    ("--trainer.devices=2", ["trainer.devices=2", "trainer.strategy=ddp", "one device"]),
    ("--trainer.num_nodes=0", ["trainer.num_nodes=0", "from 1"]),
    ("--trainer.strategy=fsdp", ["trainer.strategy=fsdp", "ddp", "fsdp2"]),
    ("--trainer.max_time=soon", ["trainer.max_time=soon", "DD:HH:MM:SS"]),
    ("--trainer.logger=3", ["trainer.logger=3", "class_path: lightning.pytorch.loggers.CSVLogger"]),
    ('--trainer.callbacks=[{"class_path":"Mine","n":1}]', ["trainer.callbacks[0].n", "init_args"]),
    ("--trainer=5", ["trainer=5", "mapping"]),
    # values that nobody can mean
    ("--optimizer.lr=.inf", ["optimizer.lr=inf", "finite"]),
    ("--optimizer.beta2=1.0", ["optimizer.beta2=1.0", "below 1"]),
    ("--cpu_threads=1000000", ["cpu_threads=1000000", "at most 1024"]),
    (f"--seed_everything={'9' * 5000}", ["--seed_everything=999", "cannot be read"]),
    (f"--run_dir={'x' * 300}", ["run_dir=xxx", "255 bytes"]),
    ("--memory=[1]", ["--memory=[1]", "mapping of keys"]),
    ("--data.path=mine.jsonl", ["data.path=mine.jsonl", "data.task=jsonl"]),
    ("--allow-module", ["--allow-module NAME"]),
    # combinations
    ("--memory.k=9 --memory.capacity=4", ["memory.k=9", "memory.capacity=4", "lower k"]),
    ("--memory.max_lessons=0", ["memory.k=4", "max_lessons", "lower k"]),
    ("--memory.max_lessons=0 --memory.max_strategies=0 --memory.max_behaviours=0", ["retrieve nothing"]),
    ("--config configs/methods/tiny/grpo.yaml --rollouts.group_size=1", ["rollouts.group_size=1", "at least 2"]),
    ("--objective.distillation=0", ["objective.policy_gradient=0", "trains nothing"]),
    ("--teacher.context=none", ["teacher.context=none", "sibling"]),
    ("--verification.final_samples=4", ["verification.pass_at", "at least 8"]),
    (f"{WRITER}.base_url=ftp://host/v1 {WRITER}.model=m", ["behaviour_writer.base_url", "http(s)://HOST"]),
    (f"{WRITER}.base_url=http://host/v1", ["behaviour_writer.model=null"]),
    (f"{WRITER}.model=m", ["behaviour_writer.base_url=null"]),
    (f"{WRITER}.base_url=http://me:hunter22@host/v1 {WRITER}.model=m", ["must hold no user, password"]),
    (f"{WRITER}.base_url=http://host/v1 {WRITER}.model=m {WRITER}.api_key_env=sk-hunter22", ["the key itself"]),
    # paths
    ("--config nope.yaml", ["nope.yaml does not exist"]),
    ("--config configs/tinyy.yaml", ["did you mean configs/tiny.yaml?"]),
    ("--config ablations/nope.yaml", ["ablations/nope.yaml does not exist"]),
    ("--config configs", ["--config=configs", "directory"]),
    ("--model.path=./nope", ["model.path=./nope", "config.json"]),
    ("--memory.embedder=/nope/at/all", ["memory.embedder=/nope/at/all", "hash"]),
    ("--ckpt_path=last", ["ckpt_path", "run_dir"]),
    ("--run_dir=/nope --ckpt_path=best", ["/nope/checkpoints/best.ckpt does not exist"]),
    ("--run_dir=configs", ["run_dir=configs is not empty", "another directory"]),
    ("--run_dir=LICENSE", ["run_dir=LICENSE is a file"]),
]


@pytest.fixture(scope="module")
def answers(run_all) -> dict[str, tuple[int, str, str]]:
    """What the command line says to each of WRONG, all asked in one process."""
    return dict(
        zip([typed for typed, _ in WRONG], run_all([[*TINY, *typed.split()] for typed, _ in WRONG]), strict=True)
    )


@pytest.mark.parametrize(("typed", "words"), WRONG, ids=[typed[:60] for typed, _ in WRONG])
def test_is_refused_in_words(answers, typed, words):
    code, out, said = answers[typed]
    assert (code, out) == (2, "")
    assert said.startswith("ConfigError: ")
    for word in words:
        assert word in said


def test_a_key_typed_by_mistake_is_not_repeated(answers):
    said = [text for typed, (*_, text) in answers.items() if "hunter22" in typed]
    assert len(said) == 2
    assert not any("hunter22" in text for text in said)


def test_all_problems_are_reported_at_once(refused):
    said = refused(*TINY, "--memory.kk=3", "--optimizer.lr=fast", "--memory.capacity=2", "--trainer.precision=17",
                   "--run_dir=configs", "--data.first_day=today")  # fmt: skip
    for word in (
        "6 problems",
        "memory.kk",
        "optimizer.lr",
        "memory.capacity=2",
        "precision=17",
        "run_dir",
        "first_day",
    ):
        assert word in said


@pytest.mark.skipif(sys.platform != "linux", reason="hides the driver by an empty library path")
def test_a_device_that_is_not_there_is_named(refused):
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        said = refused(*TINY, "--model.finetune=qlora", "--trainer.accelerator=gpu")
        assert "model.finetune=qlora needs a CUDA device" in said
        assert "trainer.accelerator=gpu needs a CUDA device" in said
    else:
        pytest.skip("this machine has a CUDA driver")


def test_wandb_that_is_not_installed_is_named(tmp_path):
    # A module that is None in sys.modules counts as not installed.
    hidden = "import sys; sys.modules['wandb'] = None; from pmd.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", hidden, *TINY, "--wandb=offline"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "wandb.mode=offline needs wandb; pip install 'pmd[wandb]'" in done.stderr


def test_malformed_yaml_is_named_with_its_file(run_all, tmp_path):
    wrong = {
        "memory: {k: 3": "not readable YAML",
        "memory:\n\tk: 3": "not readable YAML",
        "- one\n- two": "mapping of sections",
        "memory: {k: 3}\nmemory: {k: 4}": "memory",
        "memory: {k: '${no.such.key}'}": "no.such.key",
        "memory: !!python/object/apply:os.system ['true']": "not readable YAML",
        "\x00\x01": "not readable YAML",
    }
    files = [tmp_path / f"{number}.yaml" for number in range(len(wrong))]
    for file, text in zip(files, wrong, strict=True):
        file.write_text(text)
    answers = run_all([[*TINY, "--config", str(file)] for file in files])
    for (text, word), (code, out, said) in zip(wrong.items(), answers, strict=True):
        assert (code, out) == (2, ""), text
        assert word in said, text


def test_every_malformed_line_of_a_jsonl_file_is_named(refused, tmp_path):
    good = {"id": "1", "prompt": "2+2?", "verifier": "exact", "answer": "4"}
    lines = [
        json.dumps(good),
        "{not json",
        json.dumps(good | {"id": 2, "verifier": "exakt"}),
        json.dumps(good | {"id": 3, "answer": [4]}),
        json.dumps({"id": 4, "verifier": "exact", "answer": "x"}),
        json.dumps(good),
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(lines))
    said = refused(*TINY, *CHAT, "--data.task=jsonl", f"--data.path={path}")
    for number, word in ((2, "not valid JSON"), (3, "verifier"), (4, "answer"), (5, "prompt"), (6, "id")):
        assert any(f"{path}:{number}: " in line and word in line for line in said.splitlines()), (number, said)
    assert f"{path}:1:" not in said


def test_missing_data_is_named(run_all):
    answers = run_all([
        [*TINY, *CHAT, "--data.task=jsonl", "--data.path=nope.jsonl"],
        [*TINY, *CHAT, "--data.task=sciknoweval", "--data.path=nope"],
    ])  # fmt: skip
    for (code, out, said), word in zip(answers, ["nope.jsonl", "data.path=nope"], strict=True):
        assert (code, out) == (2, "")
        assert word in said


def test_evaluation_refuses_the_same_way(run_all):
    wrong = ["--config", "configs/tiny.yaml", "--ckpt_path=best", "--memory.kk=2"]
    answers = run_all([["validate", *wrong], ["test", *wrong], ["validate"], ["test"]])
    assert [code for code, _, _ in answers] == [2] * 4
    for _, _, said in answers[:2]:
        assert "memory.kk=2" in said
        assert "ckpt_path" in said
    for _, _, said in answers[2:]:
        assert "--config FILE" in said


def test_other_commands_refuse_in_words(run_all, tmp_path):
    wrong = {
        "fitt": "did you mean fit?",
        "frobnicate": "use one of fit,",
        "fit": "needs --config",
        "config": "needs a subcommand; `python -m pmd config schema` prints",
        "config shcema": "has no subcommand shcema; `python -m pmd config schema` prints",
        f"export {tmp_path} --out {tmp_path}/out": "config.yaml",
        f"inspect step {tmp_path}": "config.yaml",
        "sweep nope.yaml": "nope.yaml",
        "bench --config configs/tiny.yaml --step=3": "did you mean --steps?",
        "doctor --config configs/tiny.yaml --gpu_gb=3": "did you mean --gpu-gb?",
        "serve --config configs/tiny.yaml --prot=1": "did you mean --port?",
        "compare only_one": "at least two",
    }
    for (typed, words), (code, out, said) in zip(wrong.items(), run_all([t.split() for t in wrong]), strict=True):
        assert (code, out) == (2, ""), typed
        assert words in said, typed
