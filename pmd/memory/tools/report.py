"""Renders a memory as one static HTML page: growth, map, helpful and harmful items, ages, leaks, internalized items.

The page needs no other files. The charts are drawn in report_charts.py; the template is report.html.
"""

from collections import Counter
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from pmd.memory.store import LIVE, TABLES, MemoryStore
from pmd.memory.tools.report_charts import HALF, bars, lines, scatter

ROWS = 8
MAX_AGE = 50  # updates; older insights share a bar
MAX_TICKS = 400  # points of a curve
MAX_POINTS = 3_000  # texts on the map, the best supported ones
LEVELS = ("experiences", "insights", "behaviours")


def render(store: MemoryStore, title: str) -> str:
    """Return the page as HTML."""
    stats, history = store.stats(), growth(store)
    history = history[:: -(-len(history) // MAX_TICKS)][:-1] + history[-1:]
    frame = resources.files("pmd.memory.tools").joinpath("report.html").read_text(encoding="utf-8")
    live = sum(history[-1]["live"])
    subtitle = f"Generation {store.generation}, {live:,} live items, embedder {store.embedder.name}. Schema version "
    return Template(frame).substitute(
        title=escape(title),
        subtitle=escape(subtitle + str(store.query("PRAGMA user_version")[0][0])),
        tiles=_tiles(store, stats),
        growth=lines(
            [(name, f"var(--l{level})", [h["live"][level] for h in history]) for level, name in enumerate(LEVELS)],
            [h["generation"] for h in history], "generation",
        ),
        map=_map(store),
        useful=_ranked(store, "DESC"),
        harmful=_ranked(store, "ASC"),
        ages=_ages(store),
        internalized_curve=lines(
            [("internalized", "var(--good)", [h["internalized"] / max(1, h["live"][1]) for h in history])],
            [h["generation"] for h in history], "generation", share=True, width=HALF,
        ),
        internalized=_internalized(store),
        leaks=_leaks(store),
        footer="Written by pmd memory report. Usefulness is measured by audits (memory.audit_groups): how far an item "
        "raises the teacher's log-probability of correct attempts above a placebo of the same length, less the same "
        "for wrong attempts.",
    )  # fmt: skip


def growth(store: MemoryStore) -> list[dict[str, Any]]:
    """Return how many items of each level were live after each update, reconstructed from the log of changes.

    A compacted store reaches back to `history_from`.
    """
    status: dict[tuple[int, int], str] = {}
    for level, table in TABLES.items():
        status |= {(level, item_id): now for item_id, now in store.query(f"SELECT id, status FROM {table}")}
    counts = Counter((level, now) for (level, _), now in status.items())
    changes = store.query(
        "SELECT generation, level, item_id, action, json_extract(before, '$.status') FROM ops WHERE generation > ?"
        " AND (action != 'change' OR json_extract(before, '$.status') IS NOT NULL) ORDER BY generation DESC, id DESC",
        store.history_from,
    )
    rows: list[dict[str, Any]] = []
    position = 0
    for generation in range(store.generation, store.history_from - 1, -1):
        live = [counts[level, "active"] + counts[level, "internalized"] for level in TABLES]
        rows.append({"generation": generation, "live": live, "internalized": counts[1, "internalized"]})
        while position < len(changes) and changes[position][0] == generation:
            _, level, item_id, action, before = changes[position]
            position += 1
            if action != "delete":
                counts[level, status.get((level, item_id), "")] -= 1
            if action != "add":
                status[level, item_id] = before
                counts[level, before] += 1
    return rows[::-1]


def _tiles(store: MemoryStore, stats: dict[str, float]) -> str:
    audited, harmful = store.query(
        "SELECT count(DISTINCT level || '/' || item_id),"
        " count(DISTINCT CASE WHEN reason LIKE 'audit: harmful%' THEN level || '/' || item_id END)"
        " FROM ops WHERE reason LIKE 'audit%'"
    )[0]
    values = {
        "training tasks": f"{stats['tasks']:,.0f}",
        "live insights": f"{stats['insights'] + stats['insights_internalized']:,.0f}",
        "live behaviours": f"{len(store.behaviours()):,}",
        "tasks with an insight": f"{stats['coverage']:.0%}",
        "items audited": f"{audited:,}",
        "found harmful": f"{harmful:,}",
        "internalized": f"{stats['insights_internalized']:,.0f}",
        "quarantined": f"{stats['insights_quarantined']:,.0f}",
    }
    return "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in values.items())


def _map(store: MemoryStore) -> str:
    """Plot the texts by their first two principal components, in an embedding fitted to them."""
    insights = sorted(store.insights(), key=lambda item: (-item.support, item.id))[:MAX_POINTS]
    behaviours = store.behaviours()
    texts = [item.text for item in [*insights, *behaviours]]
    if len(texts) < 3:
        return '<p class="soft">Too few items to draw.</p>'
    vectors = store.embedder.fitted_to(sorted(set(texts))).embed(texts).astype(np.float64)
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.where(axes[:2, np.abs(axes[:2]).argmax(1)].diagonal() < 0, -1.0, 1.0)[:, None]
    places = centred @ axes.T
    points = [
        (places[n, 0], places[n, 1], item.kind, item.support, f"{item.kind} {item.id}, {item.status}: {item.text}")
        for n, item in enumerate(insights)
    ]
    points += [
        (x, y, "behaviour", item.support, f"behaviour {item.id}, {item.support} tasks: {item.text}")
        for (x, y), item in zip(places[len(insights) :], behaviours, strict=True)
    ]
    return scatter(points)


def _ranked(store: MemoryStore, order: str) -> str:
    """List the items with the highest or the lowest usefulness, each with its measured lifts."""
    sign = f"> 0 AND {LIVE}" if order == "DESC" else "< 0"
    rows = store.query_rows(
        "SELECT 2 AS level, id, 'behaviour' AS kind, content, usefulness, status, support FROM behaviours"
        f" WHERE usefulness {sign} UNION ALL SELECT 1, id, kind, content, usefulness, status, support FROM insights"
        f" WHERE usefulness {sign} ORDER BY usefulness {order}, level, id"
    )
    seen: set[tuple[int, str, str]] = set()
    body: list[str] = []
    for row in rows:
        text = (row["level"], row["kind"], row["content"])
        if text not in seen and len(body) < ROWS:
            seen.add(text)
            body.append(_item_row(store, row))
    head = '<tr><th class="n">useful</th><th>item</th><th>status</th></tr>'
    return f"<table>{head}{''.join(body)}</table>" if body else _NOTHING.format(_why_none(store))


def _why_none(store: MemoryStore) -> str:
    audited = store.query("SELECT count(*) FROM audits")[0][0]
    return "None." if audited else "Nothing has been audited: audits are off unless memory.audit_groups is set."


def _item_row(store: MemoryStore, row: dict[str, Any]) -> str:
    audits = store.query(
        "SELECT group_id, lift_correct, lift_wrong FROM audits WHERE level = ? AND item_id = ?"
        " ORDER BY id DESC LIMIT 6",
        row["level"],
        row["id"],
    )
    shown = "".join(
        f"<li>{escape(group.rsplit('/train/')[-1])}: correct {_lift(correct)}, wrong {_lift(wrong)}</li>"
        for group, correct, wrong in audits
    )
    name = escape(f"{'behaviour' if row['level'] == 2 else row['kind']} {row['id']}")
    evidence = f"<details><summary>{name}, support {row['support']}: lifts by group</summary><ul>{shown}</ul></details>"
    sign = "pos" if row["usefulness"] > 0 else "neg"
    return (
        f'<tr><td class="n {sign}">{row["usefulness"]:+.3f}</td>'
        f'<td class="text">{escape(row["content"])}{evidence}</td>'
        f'<td><span class="tag">{escape(row["status"])}</span></td></tr>'
    )


def _lift(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3f}"


def _ages(store: MemoryStore) -> str:
    ages = Counter(
        min(store.generation - generation, MAX_AGE)
        for (generation,) in store.query(f"SELECT last_generation FROM insights WHERE {LIVE}")
    )
    if not ages:
        return _NOTHING.format("No insights.")
    names = [f"{age}+" if age == MAX_AGE else str(age) for age in range(max(ages) + 1)]
    return bars([(name, ages[age]) for age, name in enumerate(names)], "updates ago", width=HALF)


def _internalized(store: MemoryStore) -> str:
    rows = store.query(
        "SELECT i.content, count(DISTINCT i.id), max(o.generation) FROM insights i JOIN ops o ON o.level = 1"
        " AND o.item_id = i.id AND o.reason LIKE 'audit: internalized%' WHERE i.status = 'internalized'"
        f" GROUP BY i.kind, i.content ORDER BY 2 DESC, 3 DESC, 1 LIMIT {2 * ROWS}"
    )
    body = "".join(
        f'<tr><td class="text">{escape(text)}</td><td class="n">{copies}</td><td class="n">{generation}</td></tr>'
        for text, copies, generation in rows
    )
    head = '<tr><th>insight</th><th class="n">tasks</th><th class="n">since generation</th></tr>'
    return f"<table>{head}{body}</table>" if rows else _NOTHING.format("Nothing yet.")


def _leaks(store: MemoryStore) -> str:
    """List tasks and reasons; the texts are left out, because they contain answers."""
    rows = store.query(
        "SELECT i.id, task_id, kind, leak, (SELECT reason FROM ops WHERE level = 1 AND item_id = i.id ORDER BY id DESC)"
        f" FROM insights i JOIN tasks t ON t.id = task_row WHERE status = 'quarantined' ORDER BY i.id LIMIT {ROWS}"
    )
    body = "".join(
        f'<tr><td class="n">{item_id}</td><td>{escape(kind)}</td><td class="text">{escape(task)}</td>'
        f"<td>{escape(leak or reason or 'not recorded')}</td></tr>"
        for item_id, task, kind, leak, reason in rows
    )
    total = store.query("SELECT count(*) FROM insights WHERE status = 'quarantined'")[0][0]
    head = '<tr><th class="n">id</th><th>kind</th><th>task</th><th>why</th></tr>'
    more = f'<p class="soft">{total - len(rows)} more.</p>' if total > len(rows) else ""
    return f"<table>{head}{body}</table>{more}" if rows else _NOTHING.format("None.")


_NOTHING = '<p class="soft">{}</p>'
