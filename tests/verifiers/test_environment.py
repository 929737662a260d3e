"""An environment for the `verifiers` package as a source of tasks, and its rewards as their verifier."""

import json
import sys
from pathlib import Path

import pytest
from command_line import ROOT, run_pmd

from pmd.config.check import check_config
from pmd.config.load import load_config
from pmd.config.schema import DataConfig
from pmd.errors import ConfigError
from pmd.rollouts.datamodule import digest_of
from pmd.tasks import describe_data_problems, duplicated_task_ids, load_tasks
from pmd.verifiers.pool import verify

PACKAGE = Path(__file__).parent / "environment_package"


def read(**data):
    return load_tasks(DataConfig(task="verifiers", **data), seed=0)


@pytest.fixture
def small_sums(monkeypatch):
    """The environment that installing tests/verifiers/environment_package installs."""
    pytest.importorskip("verifiers.v1", reason="the package verifiers is not installed")
    monkeypatch.syspath_prepend(str(PACKAGE))
    return {"id": "small-sums"}


def test_without_an_id_no_environment_is_looked_for():
    problem = "data.taskset={} names no environment; write data.taskset.id=NAME."
    assert describe_data_problems(DataConfig(task="verifiers")) == [problem]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"taskset": {"id": "x"}}, "apply to data.task=verifiers only, not to tiny"),
        ({"task": "verifiers", "taskset": {"id": "x"}, "path": "a.jsonl"}, "data.path and data.verifier do not apply"),
    ],
)
def test_keys_of_other_sources_are_refused(data, said):
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    with pytest.raises(ConfigError, match=said):
        check_config(load_config([ROOT / "configs" / "tiny.yaml"], overrides))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)  # as if it were not there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pmd\[verifiers\]'"):
        read(taskset={"id": "small-sums"})


def test_the_tasks_of_one_taskset_are_split(small_sums):
    tasks = read(taskset=small_sums)
    assert {split: len(part) for split, part in tasks.items()} == {"train": 34, "validation": 2, "test": 4}
    assert {task.verifier for part in tasks.values() for task in part} == {"environment"}
    assert digest_of(tasks) == digest_of(read(taskset=small_sums))


def test_arguments_choose_the_held_out_tasks(small_sums):
    tasks = read(taskset=small_sums, test_taskset={"first": 500, "count": 10}, validation_share=0.0)
    assert [len(tasks[split]) for split in ("train", "test")] == [40, 10]
    assert tasks["test"][0].task_id == "sum-500"


@pytest.mark.parametrize(
    ("named", "first", "said"),
    [
        (True, 35, r"data\.test_taskset=.*: 5 of 10 ids, such as sum-35, are those of training tasks; give arguments"),
        (False, 20, "each of its 10 tasks is a training task, too; give arguments"),
    ],
)
def test_held_out_tasks_that_are_trained_on_are_refused(small_sums, named, first, said):
    with pytest.raises(ConfigError, match=said):
        read(taskset={**small_sums, "named": named}, test_taskset={"first": first, "count": 10})


def test_single_questions_that_recur_are_kept_out_of_memory(small_sums):
    tasks = read(taskset={**small_sums, "named": False}, test_taskset={"first": 35, "count": 10}, validation_share=0)
    assert len(duplicated_task_ids(tasks)) == 5


def test_a_taskset_without_end_is_read_as_far_as_asked(small_sums):
    endless = {**small_sums, "count": 0}
    assert len(read(taskset=endless, max_train=30, test_taskset={"count": 5, "first": 900})["train"]) == 28
    with pytest.raises(ConfigError, match=r"it has no end: set data\.max_train"):
        read(taskset=endless)


@pytest.mark.parametrize(
    ("completion", "reward", "correct"),
    [
        ("<answer>B</answer>", 1.1, True),
        ("<answer>C</answer>", 0.1, False),
        ("so " * 40 + "<answer>B</answer>", 1.0, True),
    ],
)
def test_the_rewards_of_the_environment_are_weighed_and_added(small_sums, completion, reward, correct):
    task = next(task for task in read(taskset=small_sums)["train"] if task.task_id == "sum-0")
    verdict = verify(task, completion)
    assert (verdict.reward, verdict.correct, verdict.scored) == (pytest.approx(reward), correct, True)
    assert "num_turns 1" in verdict.explanation


@pytest.mark.parametrize(
    ("taskset", "said"),
    [
        ({"id": "no-such-environment"}, "taskset 'no-such-environment' not found"),
        ({"id": "small-sums", "cout": 3}, "Extra inputs are not permitted"),
        ({"id": "needs_more", "need": "container"}, "its tasks run in a container"),
        ({"id": "needs_more", "need": "runtime"}, "its reward right needs a sandbox"),
        ({"id": "needs_more", "need": "setup"}, "its tasks have a setup step"),
        ({"id": "needs_more", "need": "reward"}, "its tasks have no reward"),
        ({"id": "needs_more", "need": "prompt"}, "does not end with a user message"),
    ],
)
def test_an_environment_that_cannot_be_used_says_why(small_sums, taskset, said):
    with pytest.raises(ConfigError, match=said):
        read(taskset=taskset)


@pytest.mark.slow
def test_it_trains(small_sums, tmp_path):
    config = str(ROOT / "configs" / "tiny_environment.yaml")
    run_pmd("fit", "--config", config, f"--run_dir={tmp_path / 'run'}", first_on_path=PACKAGE)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = (results["phases"][name]["avg"] for name in ("initial", "last"))
    assert after > before + 0.3
