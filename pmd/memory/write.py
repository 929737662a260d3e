"""The rules of writing: what enters the memory and what is a duplicate. One `Writer` is one update.

Only training problems, ever. Successes and failures per problem, insights per problem, insights in all and behaviours
are bounded; every change of an item is logged with the whole row before and after.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import bounds, leaks
from pmd.memory.embed import Embedder, validated
from pmd.memory.judge import ItemAudit, judge, write_audits
from pmd.memory.ledger import Ledger
from pmd.memory.merge import merge_insights
from pmd.memory.records import LIVE, vector_blob
from pmd.memory.write_behaviours import BehaviourDraft, replace_behaviours
from pmd.types import InsightDraft, MemoryItem, Rollout, Task

INSIGHT_KINDS = ("strategy", "lesson", "contrast")
FEEDBACK_CHARS = 200  # of a failure without an answer, enough to tell errors apart


@dataclass(frozen=True, slots=True)
class RetrievalLog:
    """One item that was chosen for a teacher."""

    generation: int
    step: int
    group_id: str
    rank: int
    procedure: MemoryItem
    included: bool = True  # False: the prompt had no room for it


def without_thinking(response: str) -> str:
    """Return what follows the thinking; nothing where the thinking never ended."""
    visible = response.rsplit("</think>", 1)[-1]
    return re.sub(r"<think>.*", "", visible, flags=re.DOTALL).strip()


class Writer:
    """Writes inside one transaction; made by `MemoryStore.update`."""

    def __init__(self, db: sqlite3.Connection, generation: int, embedder: Embedder, config: MemoryConfig):
        self._db = db
        self.ledger = Ledger(db, generation)
        self._embedder = embedder
        self._config = config
        self._tests: dict[int, list[str]] = {}  # of the problems of this update; the store keeps no tests

    def add_problem(self, task: Task) -> int:
        """Return the id of a training problem, adding it if it is new.

        Raises:
            MemoryStoreError: the task is held out, or its text differs from that stored under its task_id.
        """
        if task.split != "train":
            raise MemoryStoreError(
                f"task_id={task.task_id} has split={task.split}; memory keeps training problems only. "
                "Write the rollouts of training tasks, never those of evaluation."
            )
        key = task.memory_key or task.question
        content = hashlib.sha256("\0".join([key, task.question, task.answer]).encode()).hexdigest()
        row = self._db.execute("SELECT id, content_sha FROM problems WHERE task_id = ?", (task.task_id,)).fetchone()
        if row is not None:
            if row[1] != content:
                raise MemoryStoreError(
                    f"task_id={task.task_id} has another text or answer than the problem stored under that id; "
                    "task ids must name one problem. Start a new store for changed data."
                )
            self._tests[row[0]] = leaks.test_texts(task.tests)
            return row[0]
        words = leaks.answer_words(task.answer)
        values = {
            "task_id": task.task_id,
            "domain": task.domain,
            "split": task.split,
            "memory_key": key,
            "question": task.question,
            "content_sha": content,
            "answer_sha": leaks.fingerprint(words),
            "answer_words": len(words),
            "answer_chars": sum(map(len, words)),
            "generation": self.ledger.generation,
        }
        problem_id = self.ledger.insert("problems", values)
        self._tests[problem_id] = leaks.test_texts(task.tests)
        return problem_id

    def add_experience(self, problem_id: int, rollout: Rollout, policy_version: int) -> int | None:
        """Keep an attempt; returns its id, or None where there is nothing to keep.

        Unscored attempts and those that are all thinking are not kept. A text (of successes) or an error (of
        failures) seen before only counts as support; above the cap the oldest leaves.
        """
        verdict = rollout.verdict
        response = without_thinking(rollout.completion.text)
        if not verdict.scored or not response:
            return None
        self._require_problem(problem_id)
        error = verdict.answer if verdict.answer is not None else verdict.feedback[:FEEDBACK_CHARS]
        signature = " ".join((response if verdict.correct else f"{verdict.status}: {error}").split())
        known = self._db.execute(
            "SELECT id FROM experiences WHERE problem_id = ? AND correct = ? AND signature = ?",
            (problem_id, int(verdict.correct), signature),
        ).fetchone()
        if known is not None:
            experience_id = known[0]
            self.ledger.seen_again(0, experience_id, {})
        else:
            values = {
                "problem_id": problem_id,
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
        bounds.bound_experiences(self.ledger, problem_id, verdict.correct, self._config.experiences_per_task)
        return experience_id

    def add_insight(
        self, problem_id: int, kind: str, text: str, *, policy_version: int, parents: Iterable[int] = ()
    ) -> int:
        """Keep what a reflection says of a problem; returns the insight's id.

        The same kind and text of the same problem is one insight: writing it again adds support and evidence, and
        brings it back if it had been retired. A text that gives the answer away is quarantined.

        Args:
            parents: ids of the experiences it rests on.
        """
        text = " ".join(text.split())
        if not text or kind not in INSIGHT_KINDS:
            raise MemoryStoreError(
                f"insight of problem_id={problem_id} has kind={kind!r}, text={text!r}; the kind must be one of "
                f"{', '.join(INSIGHT_KINDS)} and the text must not be empty. Drop unusable reflections first."
            )
        known = self._db.execute(
            "SELECT id FROM insights WHERE problem_id = ? AND kind = ? AND content = ?", (problem_id, kind, text)
        ).fetchone()
        if known is not None:
            insight_id = known[0]
            self.ledger.seen_again(1, insight_id, {"last_policy_version": policy_version}, parents)
        else:
            values = {"problem_id": problem_id, "kind": kind, "content": text, "policy_version": policy_version}
            insight_id = self._insert_insight(values, "reflection", parents)
        bounds.bound_insights(self.ledger, problem_id, insight_id, self._config.insights_per_task)
        return insight_id

    def edit_insight(self, insight_id: int, text: str, *, policy_version: int, parents: Iterable[int] = ()) -> int:
        """Put a new version in an insight's place, with its evidence and support; returns the new version's id.

        Raises:
            MemoryStoreError: there is no such insight, or the text is empty.
        """
        text = " ".join(text.split())
        row = self._db.execute(
            "SELECT problem_id, kind, content, version, support FROM insights WHERE id = ?", (insight_id,)
        ).fetchone()
        if row is None or not text:
            raise MemoryStoreError(
                f"insight={insight_id} cannot become {text!r}: it is not in the store, or the text is empty. "
                "Drop unusable reflections first."
            )
        problem_id, kind, content, version, support = row
        evidence = [*self.ledger.parents(1, insight_id), *parents]
        known = self._db.execute(
            "SELECT id FROM insights WHERE problem_id = ? AND kind = ? AND content = ?", (problem_id, kind, text)
        ).fetchone()
        if text == content or known is not None:
            new_id = known[0]
            self.ledger.seen_again(1, new_id, {"last_policy_version": policy_version}, evidence)
        else:
            values = {"problem_id": problem_id, "kind": kind, "content": text, "policy_version": policy_version}
            values |= {"version": version + 1, "previous_id": insight_id, "support": support}
            new_id = self._insert_insight(values, f"edit of {insight_id}", evidence)
        if new_id != insight_id:
            self.ledger.change(1, insight_id, {"status": "retired"}, f"edited into {new_id}")
        return new_id

    def _insert_insight(self, values: dict[str, Any], reason: str, parents: Iterable[int]) -> int:
        """Add one insight with the status that the leak filter and `memory.probation` give it."""
        leak = self.leak_of(values["problem_id"], values["content"])
        status = "quarantined" if leak else "shadow" if self._config.probation else "active"
        values = values | {"last_policy_version": values["policy_version"], "leak": leak, "status": status}
        return self.ledger.add(1, values, leak or reason, parents)

    def leak_of(self, problem_id: int, text: str) -> str:
        """Say how a text gives away the problem's answer, a solution or a test of it; empty where it does not."""
        answer = self._require_problem(problem_id)
        question = self._db.execute("SELECT question FROM problems WHERE id = ?", (problem_id,)).fetchone()[0]
        sql = "SELECT response FROM experiences WHERE problem_id = ? AND correct = 1"
        solutions, tests = (row[0] for row in self._db.execute(sql, (problem_id,))), self._tests.get(problem_id, ())
        return leaks.leak_reason(text, *answer) or leaks.copy_reason(text, question, solutions, tests)

    def apply_draft(self, problem_id: int, draft: InsightDraft, policy_version: int, parents: Iterable[int]) -> bool:
        """Carry out one change that a reflection asks for; False where it may not be.

        The target must be a live insight of the same problem, and what audits found useful is not retired on a
        reflection's word.
        """
        if draft.action == "add":
            self.add_insight(problem_id, draft.kind, draft.text, policy_version=policy_version, parents=parents)
            return True
        row = self._db.execute(
            f"SELECT usefulness FROM insights WHERE id = ? AND problem_id = ? AND ({LIVE} OR status = 'shadow')",
            (draft.target_id, problem_id),
        ).fetchone()
        if row is None or draft.target_id is None or (draft.action == "retire" and (row[0] or 0.0) > 0):
            return False
        if draft.action == "edit":
            self.edit_insight(draft.target_id, draft.text, policy_version=policy_version, parents=parents)
        elif draft.action == "retire":
            self.set_status(1, draft.target_id, "retired", "reflection")
        else:
            self.ledger.seen_again(1, draft.target_id, {"last_policy_version": policy_version}, parents)
        return True

    def merge(self, problem_ids: Iterable[int]) -> int:
        """Unite insights of one problem that say the same; returns how many were merged away."""
        if self._embedder.costly:
            self.embed_new()
        return merge_insights(self.ledger, self._embedder, problem_ids, self._config.merge_similarity)

    def audit(self, audits: Sequence[ItemAudit]) -> dict[str, int]:
        """Keep what audits found and draw the consequences; returns how many items took each new status."""
        write_audits(self.ledger, audits)
        return judge(self.ledger, audits, self._config)

    def replace_behaviours(self, drafts: Sequence[BehaviourDraft], *, policy_version: int) -> list[int | None]:
        """Make the drafts the active behaviours; returns each draft's id, None where it was left out.

        A draft that shares half of its members with an active behaviour becomes that behaviour's next version;
        behaviours that no draft continues are retired. Beyond the cap, the least supported drafts are left out.
        """
        return replace_behaviours(self.ledger, drafts, policy_version)

    def set_status(self, level: int, item_id: int, status: str, reason: str) -> None:
        """Retire, quarantine, absorb or reactivate one item."""
        self.ledger.change(level, item_id, {"status": status}, reason)

    def embed_new(self) -> None:
        """Embed what was written so far."""
        self._embed("problems", "memory_key", "TRUE")
        self._embed("behaviours", "content", "TRUE")
        if self._embedder.costly:
            self._db.execute("UPDATE insights SET embedding = NULL WHERE status = 'retired' AND embedding IS NOT NULL")
            self._embed("insights", "content", "status != 'retired'")

    def bound(self) -> None:
        """Retire what is above the capacity."""
        bounds.bound_store(self.ledger, self._config.capacity)
        bounds.delete_unlinked_experiences(self.ledger)

    def finish(self, retrievals: Sequence[RetrievalLog]) -> None:
        """Bound the store, embed what is new, write the retrieval log, count the generation."""
        self.bound()
        self.embed_new()
        self._db.executemany(
            "INSERT INTO retrievals (generation, step, group_id, level, item_id, rank, similarity, score, included,"
            " propensity) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (log.generation, log.step, log.group_id, log.procedure.level, log.procedure.item_id, log.rank,
                 log.procedure.similarity, log.procedure.score, int(log.included), log.procedure.propensity)
                for log in retrievals
            ],
        )  # fmt: skip
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'generation'", (str(self.ledger.generation),))

    def _embed(self, table: str, column: str, where: str) -> None:
        """Fill in the missing vectors, in id order."""
        rows = self._db.execute(
            f"SELECT id, {column} FROM {table} WHERE embedding IS NULL AND {where} ORDER BY id"
        ).fetchall()
        if rows:
            vectors = validated(self._embedder.embed([text for _, text in rows]), self._embedder.dimension)
            blobs = [(vector_blob(vector), row[0]) for vector, row in zip(vectors, rows, strict=True)]
            self._db.executemany(f"UPDATE {table} SET embedding = ? WHERE id = ?", blobs)

    def _require_problem(self, problem_id: int) -> tuple[str, int, int]:
        row = self._db.execute(
            "SELECT answer_sha, answer_words, answer_chars FROM problems WHERE id = ?", (problem_id,)
        ).fetchone()
        if row is None:
            raise MemoryStoreError(f"problem_id={problem_id} is not in the store; call add_problem first.")
        return row
