"""The default data set, and the seed that its split depends on."""

from pmd.config.schema import DataConfig
from pmd.tasks import describe_data_problems, duplicated_task_ids, load_tasks
from pmd.verifiers.pool import verify


def test_the_tiny_world_is_the_default():
    config = DataConfig(max_test=10)
    tasks = load_tasks(config, seed=3)
    assert {part: len(of_part) for part, of_part in tasks.items()} == {"train": 192, "validation": 64, "test": 10}
    assert all(task.split == part for part, of_part in tasks.items() for task in of_part)
    assert load_tasks(config, seed=3) == tasks != load_tasks(config, seed=4)
    assert describe_data_problems(config) == []
    assert duplicated_task_ids(tasks) == frozenset()
    assert verify(tasks["test"][0], "nonsense").scored


def test_the_seed_of_the_data_section_takes_precedence():
    assert load_tasks(DataConfig(seed=3), seed=9) == load_tasks(DataConfig(), seed=3)
