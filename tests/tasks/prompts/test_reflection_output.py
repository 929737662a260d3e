"""Whatever a model writes as a reflection, parsing it never raises and returns bounded, valid items."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd.tasks.prompts.parsing import (
    ACTIONS,
    MAX_ITEM_CHARACTERS,
    MAX_ITEMS,
    ParsedInsight,
    parse_items,
    parse_line,
)
from pmd.types import INSIGHT_KINDS

GOOD = '{"kind": "lesson", "title": "Units", "content": "Check them."}'
ITEM = ParsedInsight("lesson", "Units: Check them.")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (GOOD, [ITEM]),
        (f"```json\n{GOOD}\n```", [ITEM]),
        (f"<think>{GOOD.replace('Units', 'No')}</think>\n{GOOD}", [ITEM]),
        (
            f"half a thought {GOOD.replace('Units', 'No')} </think> {GOOD}",
            [ITEM],
        ),  # the chat template opened the thinking
        (f"<think>{GOOD}", []),  # the thinking never ended
        (f"```json\n{GOOD.replace('Units', 'Draft')}\n```\nBetter:\n```json\n{GOOD}\n```", [ITEM]),
        (f"```json\n{GOOD}", [ITEM]),  # an open fence
        (f"[{GOOD}, {GOOD[:30]}", [ITEM]),  # a truncated array
        ('{"kind": "spell"} ' + GOOD, [ITEM]),
        ("{{{{" + GOOD, [ITEM]),
        ("**Kind:** lesson\n**Title:** Units\n**Content:** Check them.", [ITEM]),
        ("kind: lesson\ntitle: Units\ncontent: Check them.\nkind: spell\ntitle: x\ncontent: y", [ITEM]),
        (" ".join([GOOD] * 9), [ITEM] * MAX_ITEMS),
        (GOOD.replace("Check", "\\ud800Check\\u0000"), [ITEM]),
        ('{"action": "retire", "insight": 2}', [ParsedInsight("strategy", "", "retire", 2)]),
        (
            '{"action": "edit", "insight": "1", "title": "a", "content": "b"}',
            [ParsedInsight("strategy", "a: b", "edit", 1)],
        ),
        ('{"action": "retire", "insight": true}', []),
        ('{"action": "retire"}', []),
        ('{"action": "drop table", "insight": 1}', []),
        ('{"kind": ["lesson"], "title": "a", "content": "b"}', []),
        ('{"kind": "lesson", "title": "a", "content": ' + "9" * 5000 + "}", []),
        ('{"kind": "lesson", "title": "a", "content": "' + "b" * 5000 + '"}', []),
        ('{"a":' * 5000, []),
        ("{" * 100_000, []),
        ("[" * 100_000 + GOOD, [ITEM]),
        ("", []),
    ],
)
def test_examples(text, items):
    assert parse_items(text).items == items


def check_bounds(text: str) -> list[ParsedInsight]:
    items, num_rejected = parse_items(text)
    assert len(items) <= MAX_ITEMS
    assert num_rejected >= 0
    for item in items:
        assert item.action in ACTIONS
        assert item.kind in INSIGHT_KINDS
        assert len(item.text) <= MAX_ITEM_CHARACTERS
        assert item.text.isprintable()
        item.text.encode("utf-8")
        assert (item.number is None) == (item.action == "add")
    line = parse_line(text)
    assert line is None or line.isprintable()
    return items


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from([*INSIGHT_KINDS, "spell"]) | JSON,
        "action": st.sampled_from([*ACTIONS, "KEEP ", "sudo"]) | JSON,
        "insight": st.integers(-3, 9) | JSON,
        "title": st.text(max_size=30) | JSON,
        "content": st.text(max_size=60) | JSON,
    },
)
NEARLY = st.lists(FIELDS, min_size=1, max_size=5).map(json.dumps)


@settings(max_examples=1500)
@given(st.text(max_size=400))
def test_any_text_is_parsed_within_bounds(text):
    check_bounds(text)


FRAMES = ["{}", "```json\n{}\n```", "<think>{}</think>{}", "x {} y"]


@settings(max_examples=300)
@given(NEARLY, st.sampled_from(FRAMES))
def test_nearly_well_formed_objects_are_parsed_within_bounds(listed, frame):
    check_bounds(frame.replace("{}", listed))


def test_many_nearly_well_formed_objects_are_parsed_within_bounds():
    draw, num_parsed = random.Random(0), 0
    odd = [None, True, -3, 2, 9.5, "", "1", " 2 ", "x" * 700, "\x00\ud800", ["a"], {"a": [1]}, float("nan"), 10**30]

    def value(*usual: object) -> object:
        return draw.choice(usual) if draw.random() < 0.8 else draw.choice(odd)

    for _ in range(10_000):
        fields = {
            "kind": value(*INSIGHT_KINDS, "spell"),
            "action": value(*ACTIONS, "KEEP ", "sudo"),
            "insight": value(*range(-3, 10)),
            "title": value("Units", "a\nb", "title: x"),
            "content": value("Check them.", "```", "}{", "</think>"),
        }
        listed = json.dumps(
            [{k: v for k, v in fields.items() if draw.random() < 0.8} for _ in range(draw.randint(1, 5))]
        )
        num_parsed += len(check_bounds(draw.choice(FRAMES).replace("{}", listed)))
    assert num_parsed > 5000
