"""What may change when a run is resumed, and what several processes and empty files are told."""

from dataclasses import asdict, replace

import pytest

from pmd.config.load import load_config
from pmd.config.processes import is_other_rank, process_problems, starts_ranks
from pmd.config.resume import CHANGEABLE, check_changes, check_end, check_same_model, find_changes
from pmd.config.schema import RunConfig
from pmd.config.values import all_keys
from pmd.errors import ConfigError


def changes_of(*overrides: str, before: dict | None = None):
    saved = asdict(RunConfig()) | {"trainer": {"max_epochs": 1}}
    loaded = load_config([], [*overrides])
    return find_changes(before or saved, asdict(loaded.run) | {"trainer": {"max_epochs": 1} | loaded.trainer})


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e-6", "optimizer.weight_decay=0.5", "optimizer.warmup_steps=3", "trainer.max_epochs=5",
        "trainer.max_time=00:01:00:00", "rollouts.tasks_per_step=3", "rollouts.group_size=2", "verifiers.workers=3",
        "rollouts.micro_batch_tokens=99", "trace_every=0", "verification.every_epochs=4", "rollouts.vllm.stall_s=1.0",
    ],
)  # fmt: skip
def test_harmless_changes_are_used(override):
    (change,) = changes_of(override)
    check_changes([change])
    assert str(change).startswith(f"{override.split('=')[0]}=")
    assert "(was " in str(change)


@pytest.mark.parametrize(
    "override",
    [
        "seed_everything=1", "model.path=tiny_exam", "model.finetune=lora", "model.lora_alpha=8.0", "teacher.kind=ema",
        "objective.alpha=0.1", "objective.distillation=2.0", "optimizer.kind=adamw_8bit_paged", "memory.enabled=false",
        "memory.import_path=x.jsonl", "data.task=jsonl", "data.seed=3", "rollouts.max_new_tokens=5",
        "verification.temperature=0.1", "reflection.by=student",
    ],
)  # fmt: skip
def test_others_are_refused(override):
    with pytest.raises(ConfigError) as refused:
        check_changes(changes_of(override, "optimizer.lr=0.5"))
    problems = refused.value.problems
    key, _, value = override.partition("=")
    assert len(problems) == 2
    assert problems[0].startswith(f"{key}={value} (was ")
    assert "cannot change when a run is resumed" in problems[0]
    assert "optimizer.lr=0.5 (was 1e-05)" in problems[1]  # and what could have been used


def test_nothing_has_changed_in_the_same_run():
    assert changes_of() == []
    assert changes_of("run_dir=elsewhere", "ckpt_path=last") == []


def test_settings_that_an_older_version_did_not_save_had_their_default():
    saved = asdict(RunConfig()) | {"trainer": {"max_epochs": 1}, "gone": 3}
    del saved["memory"]["k"]
    assert changes_of(before=saved) == []
    assert [str(change) for change in changes_of("memory.k=2", before=saved)] == ["memory.k=2 (was 4)"]


def test_an_argument_of_the_trainer_that_is_left_out_is_a_change():
    saved = asdict(RunConfig()) | {"trainer": {"max_epochs": 1, "max_steps": 7}}
    assert [str(change) for change in changes_of(before=saved)] == ["trainer.max_steps=null (was 7)"]


def test_the_list_names_keys_that_exist():
    keys = [*all_keys(RunConfig), "trainer"]
    assert [name for name in CHANGEABLE if not any(k == name or k.startswith(f"{name}.") for k in keys)] == []


@pytest.mark.parametrize("trainer", [{"max_epochs": 1}, {"max_epochs": 2, "max_steps": 5}])
def test_an_end_before_the_checkpoint_is_refused(trainer):
    with pytest.raises(
        ConfigError, match=r"trainer.max_\w+=\d is below the \d \w+ that the checkpoint has already done"
    ):
        check_end(trainer, epoch=2, step=6)
    check_end({"max_epochs": 2, "max_steps": 6}, epoch=2, step=6)
    check_end({"max_epochs": -1}, epoch=2, step=6)


def test_a_checkpoint_is_evaluated_as_the_model_that_it_is():
    check_same_model(changes_of("model.path=elsewhere", "objective.alpha=0.1", "model.attention=eager"))
    with pytest.raises(ConfigError, match=r"model.lora_alpha=8.0 \(was 32.0\) would make another policy"):
        check_same_model(changes_of("model.lora_alpha=8.0"))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused(name):
    (problem,) = process_problems({name: "2"})
    assert problem.startswith(f"{name}=2: ")
    assert "pmd trains in one" in problem
    assert process_problems({name: "1"}) == process_problems({name: ""}) == process_problems({}) == []
    assert process_problems({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}) == []


#: What torchrun sets besides WORLD_SIZE.
OF_A_RANK = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_launchers_start_as_many_ranks_as_the_run_has_devices():
    two, four = ({"strategy": "ddp", "devices": 2, "num_nodes": nodes} for nodes in (1, 2))
    for environment in ({"WORLD_SIZE": "4"}, {"SLURM_NTASKS": "4"}, {"WORLD_SIZE": "4", "SLURM_NTASKS": "2"}):
        assert process_problems(environment | OF_A_RANK | {"SLURM_NTASKS_PER_NODE": "4"}, four) == []
        (problem,) = process_problems(environment, two)
        assert "has started 4 processes, and trainer.devices x trainer.num_nodes is 2" in problem
    (problem,) = process_problems({"SLURM_NTASKS": "4"}, four)
    assert "give sbatch or srun --nodes and --ntasks-per-node=2, not --ntasks" in problem
    assert process_problems({}, two) == []
    assert "torchrun --nnodes=2 --nproc-per-node=2" in process_problems({}, four)[0]
    assert "use torchrun or SLURM's srun" in process_problems({"OMPI_COMM_WORLD_SIZE": "4"}, four)[0]
    assert [starts_ranks(two, e) for e in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"})] == [True, True, False]
    assert not starts_ranks({"strategy": "ddp"}, {})


def test_the_first_rank_alone_owns_the_run_directory():
    ranks = [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    ]
    assert [is_other_rank(environment) for environment in (*ranks, {})] == [False, True, True, False]


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "{}"])
def test_an_empty_file_is_no_configuration(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"is not readable YAML \(it is empty\)"):
        load_config([file])


def test_runs_are_compared_as_they_are_saved():
    """A relative path and the absolute one that it stands for are the same."""
    from pmd.config.save import saved_values

    loaded = load_config([], ["memory.import_path=memory.jsonl"])
    saved = saved_values(loaded)
    again = replace(
        loaded, run=replace(loaded.run, memory=replace(loaded.run.memory, import_path=saved["memory"]["import_path"]))
    )
    assert find_changes(saved, saved_values(again)) == []


def test_a_process_that_no_launcher_has_told_its_rank_is_refused():
    """Some machines set WORLD_SIZE in every shell, and some clusters set all but LOCAL_RANK."""
    one, two = ({"strategy": "ddp", "devices": devices} for devices in (1, 2))
    for trainer, environment in ((one, {"WORLD_SIZE": "1"}), (two, {"WORLD_SIZE": "2"})):
        (problem,) = process_problems(environment, trainer)
        assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; unset WORLD_SIZE" in problem
        (problem,) = process_problems(environment | OF_A_RANK | {"LOCAL_RANK": ""}, trainer)
        assert "but LOCAL_RANK is not set" in problem
        assert process_problems(environment | OF_A_RANK, trainer) == []
    assert process_problems({"WORLD_SIZE": "1"}, {"devices": 1}) == []
    assert process_problems({"WORLD_SIZE": "1"}, two) == []  # pmd starts the ranks
