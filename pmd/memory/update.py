"""Writes to the memory: decides what is stored, merged as a duplicate, quarantined as a leak, retired or dropped.

`with open_writer(store) as writer:` is one update: everything written inside it, and the incremented generation, is
committed together or not at all. Only training tasks are ever written. All choices depend only on stored values and
ids, so two builds from the same data are identical.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pmd.atomic import replace_text
from pmd.errors import MemoryStoreError
from pmd.memory.behaviours import BehaviourChange, Cluster, find_clusters, replace_behaviours
from pmd.memory.calibrate import MERGE, MIN_TEXTS, calibrate, choose_texts
from pmd.memory.checksum import announce, withdraw, write_checksum, write_generation
from pmd.memory.embed import Embedder, validated
from pmd.memory.files import one_line
from pmd.memory.judge import ItemAudit, judge, write_audits
from pmd.memory.store import (
    LIVE,
    TABLES,
    Ledger,
    MemoryStore,
    blobs_to_matrix,
    history_from,
    newest_evidence,
    vector_blob,
)
from pmd.tasks.thinking import MARK, strip_thinking
from pmd.types import INSIGHT_KINDS, InsightChange, MemoryItem, Rollout, Task

ARCHIVE = "archive"  # folder next to the store
FEEDBACK_CHARS = 200  # of the feedback that identifies a failure without an answer
SHORT_ANSWER_CHARS = 2  # answers this short occur by chance, so they leak only if announced
TEST_CHARS = 2_000  # of each test value that are compared; some are megabytes, and no model is shown more
COPIED_WORDS = 8  # this many words in a row, in a solution or test but not in the task, are a quotation
_ANNOUNCED = re.compile(r"(?:answer|option|choice|correct|result)\W+(?:(?:is|was|are|be|to|of|one)\W+){0,3}$")


@contextmanager
def open_writer(store: MemoryStore) -> Iterator["Writer"]:
    """Open one update of the store; it is committed when the block ends, and rolled back when the block raises.

    Raises:
        MemoryStoreError: another update is open, another process wrote to the store, or it cannot be written.
    """
    if store.db.in_transaction:
        raise MemoryStoreError("open_writer() inside open_writer(): finish the first update before opening another.")
    announced = False
    try:
        store.db.execute("BEGIN IMMEDIATE")
        found = int(store.meta("generation"))
        if found != store.generation:
            raise MemoryStoreError(
                f"memory store={store.path} is at generation={found}, this process read {store.generation}: another "
                "process wrote to it. Give each run a store of its own."
            )
        writer = Writer(store)
        yield writer
        writer.finish()
        _announce(store)
        announced = True
        store.db.execute("COMMIT")
    except BaseException as error:
        if store.db.in_transaction:
            store.db.execute("ROLLBACK")
        if announced:
            _withdraw(store)
        if isinstance(error, sqlite3.DatabaseError):
            raise _not_written(store, error) from error
        raise
    store.generation += 1
    try:
        write_checksum(store.db, store.path, store.generation)
    except (OSError, sqlite3.Error) as error:
        raise MemoryStoreError(
            f"memory store={store.path} is written, but its checksum could not be ({error}). Check free disk space."
        ) from error


def _announce(store: MemoryStore) -> None:
    try:
        announce(store.path, store.generation + 1)
    except OSError as error:
        raise _not_written(store, error) from error


def _withdraw(store: MemoryStore) -> None:
    """Withdraw the announcement, unless the update was committed after all."""
    with suppress(sqlite3.Error):
        if int(store.meta("generation")) == store.generation:
            withdraw(store.path)


def _not_written(store: MemoryStore, error: Exception) -> MemoryStoreError:
    return MemoryStoreError(
        f"memory store={store.path} could not be written ({one_line(error)}); nothing of this update was kept. "
        "Check free disk space and permissions, and that no other process writes to it."
    )


class Writer:
    """Writes to the store inside one transaction; created by `open_writer`."""

    def __init__(self, store: MemoryStore):
        self.store = store
        self.ledger = Ledger(store.db, store.generation + 1)
        self._db = store.db
        self._embedder = store.embedder
        self._config = store.config
        self._tests: dict[int, list[str]] = {}  # by task row, of this update only; the store keeps no tests

    def add_task(self, task: Task) -> int:
        """Return the row of a training task, adding it if it is new.

        Raises:
            MemoryStoreError: the task is held out, or its text differs from the one stored under its task_id.
        """
        if task.split != "train":
            raise MemoryStoreError(
                f"task_id={task.task_id} has split={task.split}; memory keeps training tasks only. "
                "Write the rollouts of training tasks, never those of evaluation."
            )
        key = task.lookup_key
        content = hashlib.sha256("\0".join([key, task.question, task.answer]).encode()).hexdigest()
        row = self._db.execute("SELECT id, content_sha FROM tasks WHERE task_id = ?", (task.task_id,)).fetchone()
        if row is not None:
            if row[1] != content:
                raise MemoryStoreError(
                    f"task_id={task.task_id} has another text or answer than the task stored under that id; "
                    "an id must name one task. Start a new store for changed data."
                )
            self._tests[row[0]] = test_texts(task.tests)
            return row[0]
        words = answer_words(task.answer)
        values = {
            "task_id": task.task_id,
            "domain": task.domain,
            "split": task.split,
            "memory_key": key,
            "question": task.question,
            "content_sha": content,
            "answer_sha": fingerprint(words),
            "answer_words": len(words),
            "answer_chars": sum(map(len, words)),
            "generation": self.ledger.generation,
        }
        task_row = self.ledger.insert("tasks", values)
        self._tests[task_row] = test_texts(task.tests)
        return task_row

    def add_experience(self, task_row: int, rollout: Rollout, policy_version: int) -> int | None:
        """Store an attempt; return its id, or None if it is not stored.

        Unscored attempts and attempts that contain only thinking are not stored. A success with a known text, or a
        failure with a known error, only adds support. Above the cap, the oldest attempts are retired.
        """
        verdict = rollout.verdict
        text = rollout.completion.text
        response = strip_thinking(text) if MARK.search(text) else text.strip()
        if not verdict.scored or not response:
            return None
        self._require_task(task_row)
        error = verdict.answer if verdict.answer is not None else verdict.feedback[:FEEDBACK_CHARS]
        signature = " ".join((response if verdict.correct else f"{verdict.status}: {error}").split())
        known = self._db.execute(
            "SELECT id FROM experiences WHERE task_row = ? AND correct = ? AND signature = ?",
            (task_row, int(verdict.correct), signature),
        ).fetchone()
        if known is not None:
            experience_id = known[0]
            self.ledger.count_again(0, experience_id, {})
        else:
            values = {
                "task_row": task_row,
                "rollout_id": rollout.rollout_id,
                "group_id": rollout.group_id,
                "policy_version": policy_version,
                "response": response,
                "num_tokens": len(rollout.completion.token_ids),
                "reward": verdict.reward,
                "correct": int(verdict.correct),
                "verdict_status": verdict.status,
                "answer": verdict.answer,
                "feedback": verdict.feedback,
                "signature": signature,
            }
            experience_id = self.ledger.add(0, values, "rollout")
        _bound_experiences(self.ledger, task_row, verdict.correct, self._config.experiences_per_task)
        return experience_id

    def add_insight(
        self,
        task_row: int,
        kind: str,
        text: str,
        *,
        policy_version: int,
        parents: Iterable[int] = (),
        share: tuple[int, int] = (0, 0),
    ) -> int:
        """Store an insight that a reflection wrote about a task; return its id.

        Insights with the same task, kind and text are one insight: writing it again adds support and evidence, and
        reactivates it if it had been retired. A text that gives away the answer is quarantined.

        Args:
            parents: ids of the experiences it is based on.
            share: how many of how many attempts had succeeded when it was written.
        """
        text = " ".join(text.split())
        if not text or kind not in INSIGHT_KINDS:
            raise MemoryStoreError(
                f"insight of task_row={task_row} has kind={kind!r}, text={text!r}; the kind must be one of "
                f"{', '.join(INSIGHT_KINDS)} and the text must not be empty. Drop unusable reflections first."
            )
        known = self._find_insight(task_row, kind, text)
        if known is not None:
            self.ledger.count_again(1, known, {"last_policy_version": policy_version} | _counts(share), parents)
        values = {"task_row": task_row, "kind": kind, "content": text, "policy_version": policy_version}
        values |= _counts(share)
        insight_id = known if known is not None else self._insert_insight(values, "reflection", parents)
        _bound_insights(self.ledger, task_row, insight_id, self._config.insights_per_task)
        return insight_id

    def edit_insight(
        self,
        insight_id: int,
        text: str,
        *,
        policy_version: int,
        parents: Iterable[int] = (),
        share: tuple[int, int] = (0, 0),
    ) -> int:
        """Replace an insight with a new version that keeps its evidence and support; return the new id.

        Raises:
            MemoryStoreError: there is no such insight, or the text is empty.
        """
        text = " ".join(text.split())
        row = self._db.execute(
            "SELECT task_row, kind, version, support FROM insights WHERE id = ?", (insight_id,)
        ).fetchone()
        if row is None or not text:
            raise MemoryStoreError(
                f"insight={insight_id} cannot become {text!r}: it is not in the store, or the text is empty. "
                "Drop unusable reflections first."
            )
        task_row, kind, version, support = row
        evidence = newest_evidence([*self.ledger.parents(1, insight_id), *parents])
        known = self._find_insight(task_row, kind, text)
        if known is not None:
            new_id = known
            self.ledger.count_again(1, new_id, {"last_policy_version": policy_version} | _counts(share), evidence)
        else:
            values = {"task_row": task_row, "kind": kind, "content": text, "policy_version": policy_version}
            values |= {"version": version + 1, "previous_id": insight_id, "support": support} | _counts(share)
            new_id = self._insert_insight(values, f"edit of {insight_id}", evidence)
        if new_id != insight_id:
            self.ledger.change(1, insight_id, {"status": "retired"}, f"edited into {new_id}")
        return new_id

    def apply_change(self, task_row: int, change: InsightChange, policy_version: int, parents: Iterable[int]) -> bool:
        """Apply one change that a reflection proposes; return False if it is refused.

        The target must be a live insight of the same task. A reflection cannot retire an insight that audits found
        useful.
        """
        share = change.num_successes, change.num_attempts
        if change.action == "add":
            self.add_insight(
                task_row, change.kind, change.text, policy_version=policy_version, parents=parents, share=share
            )
            return True
        row = self._db.execute(
            f"SELECT usefulness FROM insights WHERE id = ? AND task_row = ? AND {LIVE}", (change.target_id, task_row)
        ).fetchone()
        if row is None or change.target_id is None or (change.action == "retire" and (row[0] or 0.0) > 0):
            return False
        if change.action == "edit":
            self.edit_insight(
                change.target_id, change.text, policy_version=policy_version, parents=parents, share=share
            )
        elif change.action == "retire":
            self.set_status(1, change.target_id, "retired", "reflection")
        else:
            values = {"last_policy_version": policy_version} | _counts(share)
            self.ledger.count_again(1, change.target_id, values, parents)
        return True

    def leak_of(self, task_row: int, text: str) -> str:
        """Return how a text gives away the task's answer, a solution or a test; empty if it does not."""
        answer = self._require_task(task_row)
        question = self._db.execute("SELECT question FROM tasks WHERE id = ?", (task_row,)).fetchone()[0]
        sql = "SELECT response FROM experiences WHERE task_row = ? AND correct = 1"
        solutions, tests = (row[0] for row in self._db.execute(sql, (task_row,))), self._tests.get(task_row, ())
        return leak_reason(text, *answer) or copy_reason(text, question, solutions, tests)

    def merge(self, task_rows: Iterable[int]) -> int:
        """Merge insights of one task that say the same thing; return how many were merged away."""
        if self._embedder.costly:
            self.embed_new()
        similarity = self._config.merge_similarity or self._calibrated_similarity()
        self._note("merge_similarity", similarity)
        return _merge_insights(self.ledger, self._embedder, task_rows, similarity)

    def audit(self, audits: Sequence[ItemAudit]) -> dict[str, int]:
        """Store audits and update item statuses; return how many items changed to each status."""
        write_audits(self.ledger, audits)
        return judge(self.ledger, audits, self._config)

    def clusters(self) -> list[Cluster]:
        """Return the clusters of the active insights, including this update's, best supported first."""
        self.embed_new()
        clusters, similarity = find_clusters(self.store, self._config)
        if similarity is not None:
            self._note("cluster_similarity", similarity)
        return clusters

    def replace_behaviours(self, changes: Sequence[BehaviourChange], *, policy_version: int) -> list[int | None]:
        """Make these the active behaviours; return their ids, None for those left out.

        Behaviours that no change continues are retired. Above the cap, the least supported changes are left out.
        """
        return replace_behaviours(self.ledger, self.store.behaviours(), changes, policy_version)

    def log_retrievals(
        self, step: int, group_id: str, items: Sequence[MemoryItem], dropped: Sequence[MemoryItem] = ()
    ) -> None:
        """Log the items that a group's teacher was shown before this update, and those that did not fit its prompt."""
        chosen = [(item, 1) for item in items] + [(item, 0) for item in dropped]
        self._db.executemany(
            "INSERT INTO retrievals (generation, step, group_id, level, item_id, rank, similarity, score, included)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (self.store.generation, step, group_id, item.level, item.item_id, rank, item.similarity, item.score,
                 included)
                for rank, (item, included) in enumerate(chosen)
            ],
        )  # fmt: skip

    def forget(self) -> None:
        """Retire every item, so that only what this update writes can be retrieved."""
        for level, table in TABLES.items():
            for (item_id,) in self._db.execute(f"SELECT id FROM {table} WHERE {LIVE} ORDER BY id").fetchall():
                self.set_status(level, item_id, "retired", "the memory is transient")

    def set_status(self, level: int, item_id: int, status: str, reason: str) -> None:
        """Retire, quarantine, internalize or reactivate one item."""
        self.ledger.change(level, item_id, {"status": status}, reason)

    def embed_new(self) -> None:
        """Embed all stored texts that have no vector yet."""
        self._embed("tasks", "memory_key", "TRUE")
        self._embed("behaviours", "content", "TRUE")
        if self._embedder.costly:
            self._db.execute("UPDATE insights SET embedding = NULL WHERE status = 'retired' AND embedding IS NOT NULL")
            self._embed("insights", "content", "status != 'retired'")

    def bound(self) -> None:
        """Retire insights above the capacity, and delete retired experiences that no insight is based on."""
        _bound_store(self.ledger, self._config.capacity)
        _delete_unlinked_experiences(self.ledger)

    def compact(self, keep: int, *, archive: bool) -> dict[str, int]:
        """Drop what is older than `keep` generations, into the archive if asked; return the rows dropped by table."""
        folder = self.store.path.with_name(ARCHIVE) if archive else None
        try:
            return compact(self._db, self.ledger.generation, keep, folder)
        except OSError as error:
            raise MemoryStoreError(
                f"memory archive={folder} cannot be written ({error.strerror}); nothing of this update was kept. "
                "Check free disk space and permissions, or set memory.archive=false."
            ) from error

    def finish(self) -> None:
        """Enforce the caps, embed new texts, drop what is older than the kept generations, count the generation."""
        self.bound()
        self.embed_new()
        keep = self._config.keep_generations
        if keep is not None and self.ledger.generation > keep:  # until then nothing is old enough
            self.compact(keep, archive=self._config.archive)
        write_generation(self._db, self.ledger.generation)

    def _insert_insight(self, values: dict[str, Any], reason: str, parents: Iterable[int]) -> int:
        """Insert one insight, quarantined if the leak filter rejects it."""
        leak = self.leak_of(values["task_row"], values["content"])
        values = values | {"last_policy_version": values["policy_version"], "leak": leak}
        return self.ledger.add(1, values | {"status": "quarantined" if leak else "active"}, leak or reason, parents)

    def _find_insight(self, task_row: int, kind: str, text: str) -> int | None:
        sql = "SELECT id FROM insights WHERE task_row = ? AND kind = ? AND content = ?"
        row = self._db.execute(sql, (task_row, kind, text)).fetchone()
        return row[0] if row is not None else None

    def _embed(self, table: str, column: str, where: str) -> None:
        """Fill in the missing vectors, in id order."""
        rows = self._db.execute(
            f"SELECT id, {column} FROM {table} WHERE embedding IS NULL AND {where} ORDER BY id"
        ).fetchall()
        if rows:
            vectors = validated(self._embedder.embed([text for _, text in rows]), self._embedder.dimension)
            blobs = [(vector_blob(vector), row[0]) for vector, row in zip(vectors, rows, strict=True)]
            self._db.executemany(f"UPDATE {table} SET embedding = ? WHERE id = ?", blobs)

    def _calibrated_similarity(self) -> float:
        """Return the similarity from which insights of one task merge, measured on all live insights."""
        distinct = list({insight.text: insight for insight in reversed(self.store.insights())}.values())[::-1]
        if len(distinct) < MIN_TEXTS:
            return MERGE
        chosen = [distinct[position] for position in choose_texts(len(distinct))]
        if self._embedder.costly:
            ids, vectors = self.store.vectors("insights")
            vectors = vectors[np.searchsorted(ids, [insight.id for insight in chosen])]
        else:
            vectors = self._embedder.embed([insight.text for insight in chosen])
        return calibrate(vectors, [insight.task_row for insight in chosen]).merge

    def _note(self, key: str, similarity: float) -> None:
        """Keep a threshold that this update used."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, f"{similarity:.6f}"))

    def _require_task(self, task_row: int) -> tuple[str, int, int]:
        """Return the fingerprint, word count and character count of the task's answer."""
        row = self._db.execute(
            "SELECT answer_sha, answer_words, answer_chars FROM tasks WHERE id = ?", (task_row,)
        ).fetchone()
        if row is None:
            raise MemoryStoreError(f"task_row={task_row} is not in the store; call add_task first.")
        return row


def _counts(share: tuple[int, int]) -> dict[str, int]:
    """Return the columns of an insight's share of successes; none where it is not known, so that a known one stays."""
    return {"num_successes": share[0], "num_attempts": share[1]} if share[1] else {}


# The leak filter. The store keeps fingerprints of answers, not answers, so the filter compares fingerprints of word
# windows. Windows of every second word are compared too, because answers with several parts often have a label before
# each part. Code and long quotations from a solution or a test count as leaks as well.


def answer_words(text: str) -> list[str]:
    """Return the words to compare: runs of letters and digits, case-folded."""
    return re.findall(r"\w+", text.casefold())


def fingerprint(words: list[str]) -> str:
    """Return a short hash of a word sequence."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def leak_reason(text: str, answer_sha: str, num_words: int, num_chars: int) -> str:
    """Return how the text gives away the answer; empty if it does not."""
    if num_words == 0:
        return ""
    folded = text.casefold()
    matches = list(re.finditer(r"\w+", folded))
    for stride in (1, 2) if num_words > 1 else (1,):
        for start in range(len(matches) - stride * (num_words - 1)):
            window = matches[start : start + stride * (num_words - 1) + 1 : stride]
            if fingerprint([match.group() for match in window]) != answer_sha:
                continue
            if num_chars > SHORT_ANSWER_CHARS or num_words > 1:
                return "states the answer"
            if _ANNOUNCED.search(folded[: window[0].start()]):
                return "announces the answer"
    return ""


def copy_reason(text: str, question: str, solutions: Iterable[str], tests: Iterable[str] = ()) -> str:
    """Return whether the text contains code or quotes a solution or test at length; empty if it does neither."""
    if "```" in text:
        return "contains code"
    grams = _grams(text) - _grams(question)
    for source, texts in (("a solution", solutions), ("a test", tests)):
        if grams and any(grams & _grams(quoted) for quoted in texts):
            return f"quotes {source}"
    return ""


def test_texts(tests: Mapping[str, Any]) -> list[str]:
    """Return each test case of a task as one text: the input, then the expected output."""
    return [" ".join(str(value)[:TEST_CHARS] for value in case.values()) for case in tests.get("cases", ())]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = answer_words(text)
    return {tuple(words[start : start + COPIED_WORDS]) for start in range(len(words) - COPIED_WORDS + 1)}


# Merging: if several insights say the same thing in different words, one stays and gets the evidence of all. Only
# insights of the same task and kind merge: a text must stay with the task through which it is retrieved (behaviours are
# what join tasks), and a lesson never merges with a strategy.

_Row = tuple[int, str, int, bytes | None]  # id, text, support, stored vector


def _merge_insights(ledger: Ledger, embedder: Embedder, task_rows: Iterable[int], similarity: float) -> int:
    """Merge live insights of the same task that are at least this similar; return how many were merged away."""
    groups: list[list[_Row]] = []
    for task_row in sorted(set(task_rows)):
        kinds: dict[str, list[_Row]] = {}
        for kind, *row in ledger.db.execute(
            f"SELECT kind, id, content, support, embedding FROM insights WHERE task_row = ? AND +{LIVE} ORDER BY id",
            (task_row,),
        ):
            kinds.setdefault(kind, []).append(tuple(row))  # pyright: ignore[reportArgumentType]
        groups += [rows for rows in kinds.values() if len(rows) > 1]
    if not groups:
        return 0
    all_rows = [row for rows in groups for row in rows]
    if embedder.costly:
        vectors = blobs_to_matrix((row[3] for row in all_rows if row[3] is not None), embedder.dimension)
    else:  # words that occur in no task have the largest weights
        vectors = embedder.embed([row[1] for row in all_rows])
    num_merged, start = 0, 0
    for rows in groups:
        num_merged += _merge_group(ledger, rows, vectors[start : start + len(rows)], similarity)
        start += len(rows)
    return num_merged


def _merge_group(ledger: Ledger, rows: list[_Row], vectors: np.ndarray, similarity: float) -> int:
    """Merge each insight into the best supported similar one; on equal support the oldest stays."""
    alike = np.round(vectors @ vectors.T, 5)
    kept: list[int] = []
    support = [row[2] for row in rows]
    for position in sorted(range(len(rows)), key=lambda n: (-rows[n][2], rows[n][0])):
        twin = next((other for other in kept if alike[position, other] >= similarity), None)
        if twin is None:
            kept.append(position)
            continue
        support[twin] += rows[position][2]
        evidence = newest_evidence([*ledger.parents(1, rows[twin][0]), *ledger.parents(1, rows[position][0])])
        ledger.change(1, rows[twin][0], {"support": support[twin]}, f"merged with {rows[position][0]}", evidence)
        ledger.change(1, rows[position][0], {"status": "retired", "support": 0}, f"merged into {rows[twin][0]}")
    return len(rows) - len(kept)


# Caps: what is retired when one is exceeded.


def _bound_experiences(ledger: Ledger, task_row: int, correct: bool, cap: int) -> None:
    """Retire the oldest successes (or failures) of a task above the cap."""
    surplus = ledger.db.execute(
        "SELECT id FROM experiences WHERE task_row = ? AND correct = ? AND status = 'active'"
        " ORDER BY last_generation DESC, policy_version DESC, id DESC LIMIT -1 OFFSET ?",
        (task_row, int(correct), cap),
    ).fetchall()
    for (experience_id,) in surplus:
        ledger.change(0, experience_id, {"status": "retired"}, "cap of the task")


def _delete_unlinked_experiences(ledger: Ledger) -> None:
    """Delete retired experiences that no insight is based on, so that level 0 stays bounded."""
    unlinked = ledger.db.execute(
        "SELECT id FROM experiences WHERE status = 'retired' AND NOT EXISTS"
        " (SELECT 1 FROM links WHERE parent_level = 0 AND parent_id = experiences.id) ORDER BY id"
    ).fetchall()
    for (experience_id,) in unlinked:
        ledger.delete(0, experience_id, "retired, and no insight rests on it")


def _bound_insights(ledger: Ledger, task_row: int, keep: int, cap: int) -> None:
    """Retire insights of a task above the cap, but never `keep`, the one just written.

    Internalized insights go first, then those of the task's most frequent kind (lessons first if equal), so that
    lessons cannot crowd out a strategy. Within a kind, the least supported go first, then the oldest.
    """
    rows = ledger.db.execute(  # `+` keeps SQLite from walking the index of all active insights
        f"SELECT id, kind, support, status FROM insights WHERE task_row = ? AND +{LIVE} ORDER BY id", (task_row,)
    ).fetchall()
    while len(rows) > cap:
        count = {kind: sum(row[1] == kind for row in rows) for kind in {row[1] for row in rows}}
        candidates = [row for row in rows if row[0] != keep]
        leaving = min(
            candidates, key=lambda row: (row[3] != "internalized", -count[row[1]], row[1] != "lesson", row[2], row[0])
        )
        ledger.change(1, leaving[0], {"status": "retired"}, "cap of the task")
        rows.remove(leaving)


def _bound_store(ledger: Ledger, capacity: int) -> None:
    """Retire active insights above the capacity: the oldest copies of a text first, then those not seen for longest."""
    active = ledger.db.execute(f"SELECT count(*) FROM insights WHERE {LIVE}").fetchone()[0]
    if active <= capacity:
        return
    leaving = ledger.db.execute(
        "SELECT id, copies > 1 FROM (SELECT id, last_generation,"
        " row_number() OVER (PARTITION BY kind, content ORDER BY id DESC) AS copies"
        f" FROM insights WHERE {LIVE})"
        " ORDER BY copies > 1 DESC, CASE WHEN copies > 1 THEN id ELSE last_generation END, id LIMIT ?",
        (active - capacity,),
    ).fetchall()
    for insight_id, redundant in leaving:
        reason = "capacity: a newer copy exists" if redundant else "capacity: longest unseen"
        ledger.change(1, insight_id, {"status": "retired"}, reason)


# History: each update drops log rows older than the generations that are kept, and items retired before them. Every
# generation from `history_from` on can still be compared and restored, because what is dropped was the same in all of
# them. Kept whatever their age: live and quarantined items with their evidence, items that audits found harmful (so
# that they never come back), audits that still count, and per item the last log row of each verdict that audits gave.
# A retired item that is written again after it was dropped begins anew.

MAX_AUDITS = 100  # of one version of an item; two standard errors of a mean of 100 are small enough for any verdict

_LEVELS = {"behaviours": 2, "insights": 1}  # of the items that rest on others
#: Of the ops after `history_from`, the ids in a list of parents; an op of one level lists parents of the level below.
_LISTED = (
    "SELECT value FROM ops, json_each({column}, '$.parents') WHERE ops.generation > :since AND ops.level = {level}"
)
_LISTED_BEFORE_OR_AFTER = " UNION ".join(_LISTED.format(column=c, level="{level}") for c in ("before", "after"))
_ITEMS = (
    "SELECT 0 AS level, id, 1 AS version FROM experiences UNION ALL SELECT 1, id, version FROM insights"
    " UNION ALL SELECT 2, id, version FROM behaviours"
)
#: Version of each item in the oldest kept generation; later changes and deletions name the version they replaced.
_VERSIONS = (
    f"SELECT level, id, min(version) AS version FROM ({_ITEMS} UNION ALL SELECT level, item_id,"
    " json_extract(before, '$.version') FROM ops WHERE generation > :since"
    " AND json_extract(before, '$.version') IS NOT NULL) GROUP BY level, id"
)
#: What is dropped, in this order: rows go before the rows they refer to.
_DROPPED = (
    ("retrievals", "generation < :since"),
    ("behaviours", "status = 'retired' AND last_generation <= :since"),
    (
        "insights",
        "status = 'retired' AND last_generation <= :since"
        " AND id NOT IN (SELECT item_id FROM ops WHERE level = 1 AND reason LIKE 'audit: harmful%')"
        " AND id NOT IN (SELECT parent_id FROM links JOIN behaviours ON id = child_id"
        "  WHERE parent_level = 1 AND child_level = 2)"
        f" AND id NOT IN ({_LISTED_BEFORE_OR_AFTER.format(level=2)})"
        " AND id NOT IN (SELECT json_extract(before, '$.previous_id') FROM ops WHERE generation > :since"
        "  AND level = 1 AND json_extract(before, '$.previous_id') IS NOT NULL)",
    ),
    (
        "experiences",
        "status = 'retired' AND last_generation <= :since"
        " AND id NOT IN (SELECT parent_id FROM links JOIN insights ON id = child_id"
        "  WHERE parent_level = 0 AND child_level = 1)"
        f" AND id NOT IN ({_LISTED_BEFORE_OR_AFTER.format(level=1)})",
    ),
    (
        "audits",
        "generation <= :since AND (id NOT IN (SELECT a.id FROM audits a JOIN versions v ON v.level = a.level"
        " AND v.id = a.item_id AND v.version <= a.version)"
        " OR id IN (SELECT id FROM (SELECT id, row_number() OVER"
        f" (PARTITION BY level, item_id, version ORDER BY id DESC) AS age FROM audits) WHERE age > {MAX_AUDITS}))",
    ),
    (
        "ops",
        "generation <= :since AND id NOT IN (SELECT max(ops.id) FROM ops JOIN items ON items.level = ops.level"
        " AND items.id = item_id WHERE generation <= :since AND reason LIKE 'audit%'"
        " GROUP BY ops.level, item_id, json_extract(after, '$.status'))",
    ),
)


def compact(db: sqlite3.Connection, generation: int, keep: int, archive: Path | None) -> dict[str, int]:
    """Drop what is older than `keep` generations, inside the open transaction; return the rows dropped by table.

    Args:
        generation: the one that this transaction writes.
        archive: a folder; what is dropped is written to a file in it first, complete or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    since = generation - keep
    if since <= history_from(db):
        return {}
    counts: dict[str, int] = {}
    lines: list[str] = []
    for table, condition in _DROPPED:
        sql = (
            f"WITH items AS ({_ITEMS}), versions AS ({_VERSIONS}) SELECT id FROM {table} WHERE {condition} ORDER BY id"
        )
        ids = db.execute(sql, {"since": since}).fetchall()
        if archive is not None:
            lines += _archived_lines(db, table, [row_id for (row_id,) in ids])
        _delete(db, table, ids)
        counts[table] = len(ids)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('history_from', ?)", (str(since),))
    if archive is not None and lines:
        _write_archive(archive / f"generation-{generation:06d}.jsonl", lines)
    return counts


def _delete(db: sqlite3.Connection, table: str, ids: list[tuple[int]]) -> None:
    """Delete the rows, with links to their evidence; the next version of a dropped insight no longer names it."""
    if not ids:
        return
    if table == "insights":  # for the references of `previous_id`, which SQLite also looks up for each deleted row
        db.execute("CREATE INDEX insights_by_previous ON insights (previous_id) WHERE previous_id IS NOT NULL")
        db.executemany("UPDATE insights SET previous_id = NULL WHERE previous_id = ?", ids)
    db.executemany(f"DELETE FROM {table} WHERE id = ?", ids)
    if table == "insights":
        db.execute("DROP INDEX insights_by_previous")
    if table in _LEVELS:
        db.executemany(f"DELETE FROM links WHERE child_level = {_LEVELS[table]} AND child_id = ?", ids)


def _archived_lines(db: sqlite3.Connection, table: str, ids: list[int]) -> Iterator[str]:
    """Yield the rows as JSON, items with the ids of their evidence; vectors are left out."""
    for row_id in ids:
        cursor = db.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,))
        row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))
        row.pop("embedding", None)
        if table in _LEVELS:
            parents = db.execute(
                "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY 1",
                (_LEVELS[table], row_id),
            )
            row["parents"] = [parent for (parent,) in parents]
        yield json.dumps({"table": table} | row, ensure_ascii=False) + "\n"


def _write_archive(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(lines))
