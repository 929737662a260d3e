"""The tiny world's puzzles and language: solutions, parsing, and what depends on the seed."""

import random

import pytest

from pmd.tasks.prompts.words import (
    VOCABULARY,
    Line,
    memory_key,
    parse_line,
    parse_statement,
    solved_line,
    stated_rule,
    statement,
)
from pmd.tiny.world import (
    ALL_RULES,
    NAMES,
    Puzzle,
    answer,
    execution,
    family_puzzles,
    make_world,
    random_puzzle,
    rules_of,
    solution,
)

NAME = NAMES[0]
PUZZLE = Puzzle(NAME, ("3", "5", "1", "7"))


def test_a_puzzle_in_words():
    assert statement(PUZZLE) == f"task red 3 blue 5 green 1 gold 7 plan {NAME}"
    assert memory_key(PUZZLE) == f"red 3 blue 5 green 1 gold 7 {NAME}"
    assert execution("gold>red", PUZZLE) == "gold 7 red 3"
    assert solution("red>gold", PUZZLE) == "red>gold ; red 3 gold 7"
    assert answer("red>gold", PUZZLE) == "3 7"


def test_the_small_world_is_part_of_the_large_one():
    assert len(rules_of(4)) == 12
    assert len(rules_of(6)) == len(ALL_RULES) == 30
    assert set(rules_of(4)) < set(rules_of(6))
    assert len(set(NAMES)) == 64
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 130


@pytest.mark.parametrize("boxes", [4, 6])
def test_statements_are_parsed(boxes):
    draw = random.Random(0)
    for name in NAMES:
        puzzle = random_puzzle(draw, name, boxes)
        assert len(set(puzzle.digits)) == boxes
        assert parse_statement(statement(puzzle)) == puzzle


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"task red 3 blue 5 green 1 gold plan {NAME}",
        f"task blue 3 red 5 green 1 gold 7 plan {NAME}",
        f"task red x blue 5 green 1 gold 7 plan {NAME}",
        "task red 3 blue 5 green 1 gold 7 plan nobody",
    ],
)
def test_malformed_statements_are_not_parsed(text):
    assert parse_statement(text) is None


def test_memory_lines_are_parsed():
    for kind, polarity in [("strategy", "use"), ("pattern", "use"), ("lesson", "not"), ("failed", "not")]:
        text = f"{kind} {polarity} {NAME} red>gold"
        assert parse_line(text) == Line(kind, NAME, "red>gold")
        assert Line(kind, NAME, "red>gold").text == text
    success = solved_line(NAME, solution("red>gold", PUZZLE))
    assert success == f"solved use {NAME} red>gold ; red 3 gold 7"
    assert parse_line(success) == Line("solved", NAME, "red>gold")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "strategy use",
        f"strategy not {NAME} red>gold",
        f"lesson use {NAME} red>gold",
        "strategy use nobody red>gold",
        f"strategy use {NAME} red>red",
        f"strategy use {NAME} red>gold extra",
        f"solved use {NAME} red>gold red 3",
        f"memory use {NAME} red>gold",
    ],
)
def test_malformed_memory_lines_are_not_parsed(text):
    assert parse_line(text) is None


def test_the_rule_that_an_attempt_states():
    assert stated_rule("red>gold ; red 3 gold 7") == "red>gold"
    assert stated_rule("; red 3 gold 7") is None
    assert stated_rule("") is None


def test_worlds_and_puzzles_depend_on_the_seed():
    assert make_world(4, 32, 0) == make_world(4, 32, 0)
    assert make_world(4, 32, 0) != make_world(4, 32, 1)
    assert set(make_world(4, 64, 5).values()) <= set(rules_of(4))
    ten = family_puzzles(NAME, 6, 3, 10)
    assert len(set(ten)) == 10
    assert ten[:4] == family_puzzles(NAME, 6, 3, 4)
