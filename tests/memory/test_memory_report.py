"""The report is one page that stands alone; the health figures say what the store holds."""

import re
from html.parser import HTMLParser

from pmd.cli.memory import main
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.tools.report import growth, render
from pmd.memory.update import open_writer

VOID = {"meta", "link", "br", "img", "circle", "rect", "line", "polyline"}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID or (self.open and self.open[-1] == tag):
            assert self.open.pop() == tag


def audited(world, store) -> None:
    for epoch in range(3):
        world.write_epoch(store, epoch)
    harmful, useful = store.insights()[0].id, store.insights()[1].id
    with open_writer(store) as writer:
        for group in "abc":
            writer.audit(
                [
                    ItemAudit(0, group, 1, harmful, 1, 1, -0.5, 0.2, None, None, None),
                    ItemAudit(0, group, 1, useful, 1, 1, 0.5, -0.2, None, None, 0.0),
                ]
            )
        writer.add_insight(1, "lesson", "the answer is 3 7", policy_version=0)
        writer.add_insight(1, "lesson", "<script>alert(1)</script> & more", policy_version=0)


def test_growth_is_read_back_from_the_log(world, open_store):
    store = open_store(embedder=world.embedder())
    seen = [[0, 0, 0]]
    for epoch in range(3):
        world.write_epoch(store, epoch)
        seen.append([len(store.experiences()), len(store.insights()), len(store.behaviours())])
    assert [row["live"] for row in growth(store)] == seen


def test_the_page_stands_alone_and_is_sound(world, open_store):
    store = open_store(embedder=world.embedder(), insights_per_task=20)
    audited(world, store)
    page = render(store, "Memory of <x>")
    reader = Balanced()
    reader.feed(page)
    assert reader.open == []
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)  # nothing to fetch
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "the answer is 3 7" not in page  # a leak is named, not repeated
    assert "states the answer" in page
    for heading in ("Growth", "Map", "Most useful", "Most harmful", "Age of insights", "Internalized", "Leaks"):
        assert heading in page
    assert page.count("<svg") == 4


def test_an_empty_memory_has_a_page(open_store):
    assert "Too few items" in render(open_store(), "empty")


def test_commands(world, open_store, tmp_path, capsys):
    store = open_store(embedder=world.embedder())
    audited(world, store)
    store.close()
    assert main(["report", str(store.path), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert main(["audit", str(store.path)]) == 0
    shown = capsys.readouterr().out
    assert "most harmful" in shown
    assert "retired" in shown


def test_health(world, open_store):
    store = open_store(embedder=world.embedder())
    index = TaskIndex.open(store)
    assert store.health(0) == {}
    assert index.recall() is None
    audited(world, store)
    index.refresh()
    figures = store.health(10)
    assert index.recall(10) == 1.0
    found = [item.usefulness for item in store.insights(None) if item.usefulness is not None]  # copies of two texts
    assert figures["harmful_share"] == sum(value < 0 for value in found) / len(found)
    assert figures["placebo_gap"] == 0.0  # +0.5 and -0.5
    assert figures["leak_rate"] > 0
    assert 8 <= figures["age_policy_steps"] <= 10
    assert {row["level"] for row in store.item_table(10)} == {1, 2}
