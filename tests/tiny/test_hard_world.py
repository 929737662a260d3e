"""The hard tiny world: its tasks, its language, its verdicts, and the rule by which its reader is taught."""

import random
from collections import Counter

import pytest

from pmd.bootstrap.hard_samples import (
    COMMON_BOXES,
    HABIT,
    RARE_BOXES,
    TOKEN_OF,
    Difficulty,
    choice,
    draw_hard_sample,
)
from pmd.bootstrap.tiny_tokenizer import make_tokenizer
from pmd.config.check import check_config
from pmd.config.load import load_config
from pmd.config.schema import TinyWorldConfig
from pmd.errors import ConfigError
from pmd.memory.embed import HashEmbedder
from pmd.tasks.prompts.hard_words import HARD_VOCABULARY, HardWordPrompts, memory_key, stated_choices
from pmd.tasks.prompts.parsing import ParsedInsight
from pmd.tasks.prompts.words import Line, parse_line
from pmd.tasks.tiny_hard import load_tiny_hard
from pmd.tiny.hard_world import HARD_NAMES, RARE, STEM, Plan, make_hard_world
from pmd.types import Completion, Message, Rollout, Task
from pmd.verifiers.boxes import verify_each_box

ZEX, ZEK, OTHER = HARD_NAMES[0], HARD_NAMES[1], HARD_NAMES[7]
ROW = "red 3 blue 5 green 1 gold 7 pink 2 grey 9"
TASK = Task("t", (Message("user", f"task {ROW} plan {ZEX} {OTHER}"),), "each_box", "train", answer="3 7")
RIGHT = f"{ZEX} @red {OTHER} @gold ; red 3 gold 7"
HALF = f"{ZEX} @red {OTHER} @blue ; red 3 blue 5"


@pytest.fixture(scope="module")
def prompts():
    return HardWordPrompts(make_tokenizer(HARD_VOCABULARY))


@pytest.fixture(scope="module")
def tasks():
    return load_tiny_hard(TinyWorldConfig(), seed=3)


def rollout(text):
    return Rollout("r", "g", "t", (1,), Completion((2,), (0.0,), text, "stop", 0), verify_each_box(TASK, text))


def names_of(task):
    return tuple(task.question.split()[-2:])


def test_names_are_pairs_of_look_alikes_and_words_of_the_language():
    assert len(set(HARD_NAMES)) == 64
    assert len(set(HARD_VOCABULARY)) == len(HARD_VOCABULARY)
    stems = Counter(name[:STEM] for name in HARD_NAMES)
    assert set(stems.values()) == {2}


def test_held_out_plans_pair_known_names_anew(tasks):
    assert {split: len(found) for split, found in tasks.items()} == {"train": 192, "validation": 64, "test": 128}
    every = [task for found in tasks.values() for task in found]
    assert len({names_of(task) for task in every}) == len({task.task_id for task in every}) == len(every)
    seen = Counter(name for task in tasks["train"] for name in names_of(task))
    assert {name for task in tasks["test"] for name in names_of(task)} <= set(seen)
    assert min(seen.values()) >= 6
    assert load_tiny_hard(TinyWorldConfig(), seed=3) == tasks
    assert load_tiny_hard(TinyWorldConfig(test_per_family=9), seed=3)["train"] == tasks["train"]


def test_the_answer_follows_from_both_names(tasks):
    boxes = make_hard_world(32, seed=3)
    for task in tasks["test"]:
        row = dict(zip(task.question.split()[1:-3:2], task.question.split()[2:-3:2], strict=True))
        assert task.answer == " ".join(row[boxes[name]] for name in names_of(task))
    assert sum(box in RARE for box in boxes.values()) in (15, 16)


def test_a_look_alike_is_nearer_than_a_stranger(tasks):
    embedder = HashEmbedder.fit([task.memory_key for task in tasks["train"]])
    partner, *names = sorted({name for task in tasks["train"] for name in names_of(task)})
    keys = [memory_key(Plan((name, partner), tuple("012345"))) for name in names]
    vectors = dict(zip(names, embedder.embed(keys), strict=True))
    for name in names:
        near = {other: float(vectors[name] @ vectors[other]) for other in names if other != name}
        nearest = max(near, key=near.__getitem__)
        assert nearest[:STEM] == name[:STEM] or name[:STEM] == partner[:STEM]
        assert near[nearest] < 0.99


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (RIGHT, "ok", ["right", "right"]),
        (HALF, "wrong_answer", ["right", "wrong"]),
        (f"{ZEX} @grey {OTHER} @gold ; grey 9 gold 7", "wrong_answer", ["wrong", "right"]),
        ("; 7 3", "wrong_answer", ["wrong", "wrong"]),
        (f"{ZEX} @red", "format", []),
    ],
)
def test_the_verdict_speaks_of_each_box(text, status, said):
    verdict = verify_each_box(TASK, text)
    assert (verdict.status, verdict.correct) == (status, status == "ok")
    words = verdict.feedback.rstrip(".").replace(",", "").split()
    assert [word for word in words if word in ("right", "wrong")] == said


def test_the_teacher_sees_success_and_judged_failure(prompts):
    line = f"lesson not {ZEX} @blue"

    def shown(*arguments):
        return prompts.tokenizer.decode(prompts.teacher(TASK, *arguments))

    assert shown([], None, None) == f"<bos> {TASK.question}"
    assert shown([line], f"{RIGHT} <eos>", None) == f"<bos> memory {line} . solved {RIGHT} . {TASK.question}"
    assert shown([RIGHT], None, None) == f"<bos> memory solved {RIGHT} . {TASK.question}"
    failed = f"solved {ZEX} @red . failed not {OTHER} @blue"
    assert shown([], None, rollout(HALF)) == f"<bos> memory {failed} . {TASK.question}"
    assert shown([], None, rollout("; 7 3")) == f"<bos> {TASK.question}"


def test_one_reflection_for_each_name_box_and_verdict(prompts):
    group = [rollout(text) for text in (RIGHT, HALF, f"{RIGHT} <eos>", "; gold")]
    texts = [prompts.tokenizer.decode(ids) for ids in prompts.reflection(TASK, group)]
    assert texts == [
        f"<bos> {TASK.question} {RIGHT} verdict {ZEX} right insight",
        f"<bos> {TASK.question} {RIGHT} verdict {OTHER} right insight",
        f"<bos> {TASK.question} {HALF} verdict {OTHER} wrong insight",
    ]


def test_lines_are_parsed_in_the_language_of_their_world(prompts):
    line = f"strategy use {ZEX} @red"
    assert prompts.parse_reflection(f"{line} <eos>").items == [ParsedInsight("strategy", line)]
    assert prompts.parse_abstraction(f"use {ZEX} @red") == f"pattern use {ZEX} @red"
    for text in (f"strategy use {ZEX} red>gold", f"lesson use {ZEX} @red", "strategy use nobody @red"):
        assert prompts.parse_reflection(text).items == []
    assert parse_line(line) is None  # not in the language of the plain world
    placebo = prompts.placebo(line).split()
    assert placebo[2] != ZEX
    assert [placebo[n] for n in (0, 1, 3)] == ["strategy", "use", "@red"]


def test_a_pattern_is_about_the_best_supported_strategy(prompts):
    lines = [f"strategy use {ZEX} @red", f"strategy use {OTHER} @pink", f"strategy use {ZEX} @blue"]
    shown = prompts.tokenizer.decode(prompts.abstraction(lines))
    assert shown.startswith(f"<bos> insights {lines[0]} .")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", HABIT),
        ("strategy @red", {"@red": 1.0}),
        ("strategy @red strategy @gold", {"@red": 0.5, "@gold": 0.5}),
        ("strategy @red pattern @gold", {"@red": 0.1, "@gold": 0.9}),
        ("strategy @red lesson @red pattern @gold", {"@gold": 1.0}),
        ("pattern @red lesson @red", {"@red": 1.0}),
        ("solved @pink pattern @red strategy @red", {"@pink": 1.0}),
        ("failed @red strategy @red strategy @grey", {"@grey": 1.0}),
        ("lesson @red lesson @blue lesson @green", dict.fromkeys(RARE_BOXES, 1 / 3)),
        ("lesson @red lesson @blue lesson @green lesson @gold failed @pink", {"@grey": 1.0}),
    ],
)
def test_the_readers_rule(said, expected):
    words = said.split()
    lines = [Line(kind, ZEX, box) for kind, box in zip(words[::2], words[1::2], strict=True)]
    assert choice(lines) == pytest.approx(expected)


def test_habit_falls_back_on_what_lessons_leave():
    left = choice([Line("lesson", ZEX, COMMON_BOXES[0])])
    assert COMMON_BOXES[0] not in left
    assert left[COMMON_BOXES[1]] == pytest.approx(left[COMMON_BOXES[2]])
    assert left[RARE_BOXES[0]] < 0.01


def test_the_labels_of_the_samples_follow_the_readers_rule():
    draw, checked = random.Random(0), 0
    for _ in range(250):
        sample = draw_hard_sample(draw, Difficulty.at(1.0))
        words = [HARD_VOCABULARY[token] for token in sample.ids]
        if words[1] != "memory":
            continue
        about = lines_by_name(" ".join(words[2 : words.index("task")]))
        for position, shares in sample.shares.items():
            expected = choice(about.get(words[position - 1], []))
            assert {HARD_VOCABULARY[token]: share for token, share in shares.items()} == pytest.approx(expected)
            assert sample.ids[position] in shares
            checked += 1
    assert checked > 150


def lines_by_name(text):
    """Read a memory section word by word, independently of the code that wrote it."""
    found = {}
    for part in text.split(" ."):
        kind, *rest = part.split() or [""]
        if kind == "solved":
            for name, box in stated_choices(" ".join(rest)) or [tuple(rest[:2])]:
                found.setdefault(name, []).append(Line("solved", name, box))
        elif kind:
            found.setdefault(rest[1], []).append(Line(kind, rest[1], rest[2]))
    return found


def test_reflections_are_taught_to_err():
    draw, errors = random.Random(1), []
    for _ in range(200):
        sample = draw_hard_sample(draw, Difficulty.at(1.0))
        words = [HARD_VOCABULARY[token] for token in sample.ids]
        if "verdict" not in words or not sample.shares:
            continue
        name = words[words.index("verdict") + 1]
        opened = dict(stated_choices(" ".join(words[words.index("plan") + 3 : words.index("verdict")])))[name]
        (shares,) = sample.shares.values()
        assert max(shares, key=shares.__getitem__) == TOKEN_OF[opened]
        errors.append(1 - max(shares.values()))
    assert len(errors) > 10
    assert errors == pytest.approx([0.15] * len(errors))


def test_impossible_sizes_are_refused_with_the_remedy():
    loaded = load_config(["configs/tiny_hard.yaml"], ["data.world.families=7", "model.prompts=words"])
    with pytest.raises(ConfigError) as error:
        check_config(loaded)
    text = "\n".join(error.value.problems)
    assert "data.world.families=7 must be even" in text
    assert "tasks per family for 7 names" in text
    assert "model.prompts=words with data.task=tiny_hard; use hard_words" in text
