"""Diversity, exploration and scopes: who gets a place beside what is chosen already, and with what probability."""

import random
from collections import Counter

import pytest
from memory_world import make_task
from pmd.memory.rank import Ranking

from pmd.config.schema import MemoryConfig
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.update import open_writer
from pmd.types import MemoryItem

TEXTS = ("peel the apple first", "peel the apple at first", "wait for the pear")
SUPPORT = (0.9, 0.8, 0.5)


def ranking(texts=TEXTS, support=SUPPORT, usefulness=None, **config) -> Ranking:
    found = Ranking(MemoryConfig(**config))
    for n, (text, similarity) in enumerate(zip(texts, support, strict=True), start=1):
        item = MemoryItem(n, 1, "strategy", text, n, f"t{n}", similarity)
        found.add(item, similarity, usefulness[n - 1] if usefulness else None)
    return found


def chosen(found: Ranking, quota: int, taken=(), seed=0) -> list[int]:
    return [p.item_id for p in found.best(quota, list(taken), random.Random(seed))]


def test_without_diversity_the_nearest_are_chosen():
    assert chosen(ranking(), 2) == [1, 2]


def test_diversity_prefers_what_does_not_repeat():
    assert chosen(ranking(diversity=0.9), 2) == [1, 3]
    assert chosen(ranking(diversity=0.9), 3) == [1, 3, 2]  # a repetition comes last, not never
    assert chosen(ranking(diversity=0.1), 2) == [1, 2]  # a little of it does not outweigh nearness


def test_diversity_looks_at_what_other_kinds_gave_already():
    behaviour = MemoryItem(9, 2, "behaviour", "first peel the apple", None, None)
    assert chosen(ranking(diversity=0.9), 1, [behaviour]) == [3]
    assert chosen(ranking(), 1, [behaviour]) == [1]


def test_a_text_that_is_shown_already_is_not_shown_again():
    assert chosen(ranking(), 3, [MemoryItem(9, 2, "behaviour", TEXTS[0], None, None)]) == [2, 3]


def test_scores_say_what_the_order_was():
    for diversity in (0.0, 0.9):
        scores = [p.score for p in ranking(diversity=diversity).best(3, [], random.Random(0))]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_propensities_are_the_probabilities(exploration):
    found = ranking(exploration=exploration)
    first = Counter()
    for seed in range(3000):
        one = found.best(1, [], random.Random(seed))[0]
        first[one.item_id, round(one.propensity, 9)] += 1
    assert len({number for number, _ in first}) == (1 if exploration == 0 else 3)
    assert {number: p for number, p in first}[1] == pytest.approx(1 - exploration + exploration / 3)
    for (_, propensity), count in first.items():
        assert count / 3000 == pytest.approx(propensity, abs=0.03)


def test_exploration_is_repeated_by_its_seed_and_fills_each_place_once():
    found = ranking(exploration=0.5)
    assert chosen(found, 3, seed=4) == chosen(found, 3, seed=4)
    assert len({tuple(chosen(found, 3, seed=seed)) for seed in range(50)}) == 6
    assert all(sorted(chosen(found, 3, seed=seed)) == [1, 2, 3] for seed in range(50))


def test_usefulness_moves_the_rank_by_at_most_its_weight():
    assert chosen(ranking(usefulness=[-5.0, None, 5.0]), 3) == [2, 1, 3]
    assert chosen(ranking(usefulness=[-5.0, None, 5.0], usefulness_weight=0.0), 3) == [1, 2, 3]


@pytest.fixture
def store(open_store):
    found = open_store()
    with open_writer(found) as writer:
        for n, key in enumerate(["apple red", "apple green", "apple blue"], start=1):
            task_row = writer.add_task(make_task(f"t{n}", key=key))
            writer.add_insight(task_row, "strategy", f"strategy of {n}", policy_version=0)
            writer.add_insight(task_row, "lesson", f"lesson of {n}", policy_version=0)
    return found


@pytest.mark.parametrize(
    ("scope", "task_id", "wanted"),
    [
        ("both", "t1", {"t1", "t2", "t3"}),
        ("own", "t1", {"t1"}),
        ("neighbours", "t1", {"t2", "t3"}),
        ("own", "new", set()),  # a problem that memory does not know has nothing of its own
        ("neighbours", "new", {"t1", "t2", "t3"}),
        ("own", None, set()),
    ],
)
def test_scopes(store, scope, task_id, wanted):
    retriever = Retriever(store, TaskIndex.open(store), MemoryConfig(k=9, scope=scope, max_strategies=9, levels=[1]))
    found = retriever.retrieve("apple red", seed=0, task_id=task_id)
    assert {p.task_id for p in found} == wanted
    assert len(found) == 2 * len(wanted)


def test_exploration_and_diversity_change_nothing_in_who_may_be_shown(store):
    """Explored places go to candidates of the query, and retrieval is repeated by the seed."""
    config = MemoryConfig(k=3, exploration=1.0, diversity=0.5, levels=[1])
    retriever = Retriever(store, TaskIndex.open(store), config)
    runs = [retriever.retrieve("apple red", seed=seed) for seed in range(20)]
    assert runs == [retriever.retrieve("apple red", seed=seed) for seed in range(20)]
    assert len({frozenset(p.text for p in run) for run in runs}) > 3
    assert all(sum(p.kind == "strategy" for p in run) <= config.max_strategies for run in runs)
    assert all(0.0 < p.propensity < 1.0 for run in runs for p in run[:2])
