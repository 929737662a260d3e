"""Hostile and malformed configurations are refused in words; what comes from the environment is not saved or shown."""

import dataclasses
import json
import typing

import pytest
from omegaconf import OmegaConf

from pmd.config.check import check_config
from pmd.config.load import load_arguments, load_config
from pmd.config.save import resolved_values, saved_yaml
from pmd.config.schema import RunConfig
from pmd.config.trainer import trainer_problems
from pmd.config.values import all_keys, shown
from pmd.errors import ConfigError

BOMB = "x0: &x0 [1, 1]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
FILES = {
    "aliases that repeat each other": (BOMB, "values, counting what aliases repeat"),
    "an alias in itself": ("a: &a\n  b: *a\n", "*a is part of what it stands for"),
    "deep maps": ("data: " + "{a: " * 5000 + "1" + "}" * 5000, "nested more than 20 deep"),
    "deep lists": ("data: " + "[" * 5000, "nested more than 20 deep"),
    "a long number": (f"seed_everything: {'9' * 60_000}", "not readable YAML"),
    "a large file": ("a: 1\n" * 300_000, "more than 1048576 bytes"),
    "bytes": ("model: !!binary aGVsbG8=", "model=b'hello' must be a section"),
    "a section as a list": ("memory: [1, 2]", "a section is a mapping of keys"),
    "a section as text": ("memory: many", "memory=many must be a section"),
    "an interpolation of itself": ("method: ${method}", "interpolation failed"),
    "deep interpolations": (f"method: {'${' * 500}x{'}' * 500}", "maximum recursion depth"),
    "a set": ("memory: !!set {a, b}", "not readable YAML"),
}


def said(tmp_path, *texts: str, overrides=()) -> str:
    """Return what is wrong with `configs/tiny.yaml` under these files."""
    files = ["configs/tiny.yaml"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        files.append(str(tmp_path / f"{number}.yaml"))
    try:
        check_config(load_config(files, overrides))
    except ConfigError as error:
        str(error).encode("utf-8")
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_words(tmp_path, name):
    text, words = FILES[name]
    assert words in said(tmp_path, text)


@pytest.mark.parametrize("file", ["/dev/zero", "x" * 300 + ".yaml", "a\0b", "/dev/null/x", "configs"])
def test_what_is_no_file_is_refused_in_words(file):
    with pytest.raises(ConfigError, match="--config="):
        load_config([file])


def test_an_endless_file_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        load_config(["/dev/zero"])


TEXT = {
    "half a character": "half \ud83d",
    "nul": "a\0b",
    "a terminal escape": "\x1b[31mred",
    "two lines": "a\nb",
    "nothing": "",
    "blanks": "  ",
    "a long text": "x/" * 3000,
    "a long name": "x" * 256,
}


@pytest.mark.parametrize(
    "key", ["method", "run_dir", "model.path", "data.path", "memory.embedder", "rollouts.server.urls"]
)
@pytest.mark.parametrize("name", TEXT)
def test_no_text_may_be_unprintable_empty_or_too_long(tmp_path, key, name):
    value = TEXT[name]
    plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=x"]))
    section = plain
    *parents, last = key.split(".")
    for parent in parents:
        section = section[parent]
    section[last] = [value] if last == "urls" else value
    found = said(tmp_path, json.dumps(plain))
    if name == "half a character":  # YAML has none, and names its line and column
        assert "0.yaml is not readable YAML" in found
        assert "line 1, column" in found
        return
    assert f"{key}=" in found
    assert any(rule in found for rule in ("printable", "must not be empty", "at most 4095", "more than 255 bytes"))


def test_bytes_of_the_command_line_that_are_no_text_are_refused():
    with pytest.raises(ConfigError, match=r"--method=\\udcff cannot be read"):
        load_config([], ["method=\udcff"])


def numeric_fields():
    for key in all_keys(RunConfig):
        section: typing.Any = RunConfig
        *parents, name = key.split(".")
        for parent in parents:
            section = typing.get_type_hints(section)[parent]
        hint = typing.get_type_hints(section)[name]
        options = {hint, *typing.get_args(hint)}
        if options & {int, float} or hint == list[int]:
            yield key, next(f for f in dataclasses.fields(section) if f.name == name).metadata, hint


NUMERIC = list(numeric_fields())


def test_every_number_has_bounds_on_both_sides():
    assert len(NUMERIC) > 70
    for key, bounds, _ in NUMERIC:
        assert bounds.keys() & {"minimum", "above"}, key
        assert bounds.keys() & {"maximum", "below"}, key


def test_no_number_may_be_infinite_absurd_or_beyond_its_bounds():
    def wrong(bounds) -> list[str]:
        top = bounds.get("maximum", bounds.get("below"))
        edges = [bounds.get("below", top * 2 + 1), bounds.get("above", bounds.get("minimum", 0) - 1)]
        return [".inf", "-.inf", ".nan", "1" + "0" * 400, "-" + "1" * 30, *map(str, edges)]

    for number in range(7):
        overrides = []
        for key, bounds, hint in NUMERIC:
            value = wrong(bounds)[number]
            overrides.append(f"{key}=[{value}]" if hint == list[int] else f"{key}={value}")
        refused = {problem.partition("=")[0] for problem in load_config([], overrides).problems}
        assert refused == {key for key, _, _ in NUMERIC}, overrides


@pytest.mark.parametrize("key", ["optimizer.beta1", "optimizer.beta2", "teacher.ema_rate", "teacher.trust_region_rate"])
def test_rates_that_would_never_move_or_divide_by_zero_are_refused(key):
    (problem,) = load_config([], [f"{key}=1.0"]).problems
    assert problem == f"{key}=1.0 must be below 1."
    assert load_config([], [f"{key}=0.99"]).problems == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.path=tasks.jsonl"], "data.path=tasks.jsonl with data.task=tiny: the tiny world reads no file"),
        (["data.validation_path=x"], "data.validation_path=x applies to data.task=jsonl only"),
        (["rollouts.tasks_per_step=65536", "rollouts.group_size=1000"], "rollouts a step"),
        (["rollouts.engine_batch=65536", "rollouts.max_new_tokens=8192"], "random numbers at once"),
        (["reflection.temperature=0.001"], "must be 0 (greedy) or at least 0.01"),
        (["rollouts.engine=vllm", "model.finetune=lora", "model.lora_rank=600"], "vLLM serves ranks up to 512"),
        (["rollouts.engine=vllm_server", "model.finetune=lora", "model.lora_rank=600"], "vLLM serves ranks up to 512"),
        (["data.domains=[]"], "names no domain"),
        (["data.test_domains=[]"], "data.test_domains=[] names no domain"),
        (["data.test_domains=[physics]"], "data.test_domains=['physics'] applies to SciKnowEval only"),
        (["data.own_split=true"], "data.own_split=true applies to SciKnowEval only"),
        (["data.scorer=sdpo"], "applies to LiveCodeBench only"),
        (["data.task=tiny_hard", "data.world.families=5"], "data.world.families=5 must be even"),
        (["data.task=tiny_hard", "data.world.train_per_family=50"], "a name begins at most"),
        (["model.attention=flash_attention_2"], "needs model.dtype=bfloat16"),
        (["optimizer.kind=adamw_8bit_paged"], "needs a CUDA device and none was found; use adamw"),
        (["model.layer_kernels=liger"], "needs a CUDA device and none was found; use plain"),
        (["model.finetune=qlora"], "model.finetune=qlora needs a CUDA device"),
        (["rollouts.uniform_groups=drop"], "a group of failures has lessons; use keep"),
        (["rollouts.updates_per_batch=50", "rollouts.tasks_per_step=8"], "each update needs a task"),
        (["rollouts.temperature=0.7"], "importance weights compare untempered log-probs"),
        (["teacher.kind=ema", "teacher.refresh_epochs=2"], "needs teacher.kind=frozen, not ema"),
        (["verification.pass_at=[]"], "verification.pass_at=[] must be whole numbers of at least 1"),
        (["memory.k=64", "memory.capacity=10"], "exceeds memory.capacity=10"),
        (["memory.levels=[]"], "memory.levels=[] retrieves nothing"),
        (["memory.embedder_device=cuda"], "needs a CUDA device and none was found; use cpu"),
        (["memory.embedder=./nowhere/at all"], "is not a directory"),
        (["memory.transient=true"], "would be forgotten before any teacher reads it"),
        (["memory.transient=true", "memory.update=batch", "memory.replay=true"], "a past success is kept"),
        (["memory.transient=true", "memory.update=batch", "memory.frozen=true"], "a frozen memory is kept"),
        (["memory.update=batch", "memory.audit_groups=2"], "audits judge what the teachers of a whole epoch"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=[]"], "names no server"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=['ftp://a:1']"], "must begin with http:// or https://"),
        (["rollouts.engine=vllm_server", "rollouts.server.urls=['http://a:99999']"], "names no host and port"),
        (["rollouts.engine=vllm_server"], "servers accept adapters only"),
        (["reflection.behaviour_writer.model=m"], "base_url=null, so nothing asks its model"),
        (["reflection.behaviour_writer.base_url=here"], "must be http(s)://HOST[:PORT]/v1"),
        (["reflection.behaviour_writer.base_url=http://me:secret@host/v1"], "must hold no user, password or query"),
        (["reflection.behaviour_writer.base_url=http://host/v1"], "name a model that the endpoint"),
        (
            ["reflection.behaviour_writer.base_url=http://host/v1", "reflection.behaviour_writer.api_key_env=NOT_SET"],
            "must be the name of an environment variable that is set",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(tmp_path, overrides, words):
    assert words in said(tmp_path, overrides=overrides)


@pytest.mark.parametrize(
    "value",
    ["00:00:00:00", "99999999999:0:0:0", "20000:00:00:00", "\u0661:0:0:0", "1:2:3", {"hours": -1}, {"hours": 0},
     {"days": 10**15}, {"eons": 1}, {"milliseconds": 0}, {}, "x" * 300],
)  # fmt: skip
def test_times_that_cannot_be_kept_are_refused(value):
    assert trainer_problems({"max_time": value})
    assert trainer_problems({"max_time": "00:12:00:00"}) == trainer_problems({"max_time": {"milliseconds": 1}}) == []


@pytest.mark.parametrize("key", ["max_epochs", "max_steps", "min_epochs", "log_every_n_steps"])
def test_counts_of_the_trainer_are_bounded(key):
    assert trainer_problems({key: 10**9})
    assert trainer_problems({key: 10**5000})
    assert trainer_problems({key: 3}) == []


def test_any_value_can_be_shown():
    for value in (16**5000, "\ud83d", "\x1b[31m", [16**5000], "x" * 1000, float("nan")):
        text = shown(value)
        assert text.isprintable()
        assert len(text) <= 80


SECRET = "hf_very_secret_token"


def test_what_comes_from_the_environment_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("PMD_SECRET", SECRET)
    monkeypatch.setenv("PMD_GROUP", "3")
    text = """
    method: "with ${oc.env:PMD_SECRET}"
    data: {task: jsonl, path: "/data/${method}.jsonl"}
    rollouts:
      group_size: ${oc.decode:${oc.env:PMD_GROUP}}
      tasks_per_step: ${rollouts.group_size}
      server: {urls: ["http://user:${oc.env:PMD_SECRET}@host:1", "http://host:2"]}
    """
    (tmp_path / "run.yaml").write_text(text)
    loaded = load_config([tmp_path / "run.yaml"], ["run_dir=/runs/x"])
    assert loaded.problems == []
    assert (loaded.run.method, loaded.run.rollouts.tasks_per_step) == (f"with {SECRET}", 3)
    saved = saved_yaml(loaded)
    assert SECRET not in saved
    assert SECRET not in json.dumps(resolved_values(loaded))
    (tmp_path / "config.yaml").write_text(saved)
    again = load_config([tmp_path / "config.yaml"])
    assert again.problems == []
    assert again.run == dataclasses.replace(loaded.run, run_dir=None)


def test_what_comes_from_the_environment_is_not_shown_in_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("PMD_SECRET", SECRET)
    text = 'model: {path: "./${oc.env:PMD_SECRET}"}\noptimizer: {lr: "${oc.env:PMD_SECRET}"}\n'
    found = said(tmp_path, text)
    assert SECRET not in found
    assert "optimizer.lr=${oc.env:PMD_SECRET} must be a number" in found
    assert "model.path=./${oc.env:PMD_SECRET} holds no config.json" in found


def test_without_the_environment_a_saved_configuration_is_resolved(tmp_path):
    loaded = load_config(["configs/tiny.yaml"], ["rollouts.group_size=${rollouts.tasks_per_step}", "method=a \\${b}"])
    saved = saved_yaml(loaded)
    assert "group_size: 32" in saved
    (tmp_path / "config.yaml").write_text(saved)
    assert load_config([tmp_path / "config.yaml"]).run.method == loaded.run.method == "a ${b}"


def test_allowed_modules_come_from_files_and_from_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {task: jsonl, path: x.jsonl, allow_modules: [first]}")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--allow-module", "second", "--allow-module=first"]
    loaded = load_arguments("fit", arguments)
    assert loaded.run.data.allow_modules == ["first", "second"]
    assert "- second" in saved_yaml(loaded)
    for wrong in (["--allow-module"], ["--allow-module", "--config"], ["--allow-module="]):
        with pytest.raises(ConfigError, match="needs the name of a module"):
            load_arguments("fit", [*arguments, *wrong])
