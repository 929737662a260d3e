"""How clusters become behaviours with stable ids: matched to the active ones by their members."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from pmd.memory.ledger import Ledger
from pmd.memory.records import Behaviour, read_behaviours

MAX_BEHAVIOURS = 256
SAME_BEHAVIOUR = 0.5  # Jaccard similarity of the members' texts from which a cluster continues a behaviour


@dataclass(frozen=True, slots=True)
class BehaviourDraft:
    """A cluster and what it says. Without text (abstraction failed), the cluster's old behaviour stays as it is."""

    polarity: str
    member_ids: tuple[int, ...]  # insights
    evidence_sha: str  # of the texts it was abstracted from
    text: str | None


def match_behaviours(
    db: sqlite3.Connection, clusters: Sequence[tuple[str, Sequence[int]]], behaviours: Sequence[Behaviour]
) -> dict[int, int]:
    """Pair clusters with behaviours of their polarity, the most alike first, each at most once.

    Alike is the share of common texts: the same insight learnt on one more problem does not make another behaviour.

    Args:
        clusters: polarity and insight ids of each.

    Returns:
        position of the cluster -> id of the behaviour, where they share half of their texts.
    """
    text_of = dict(db.execute("SELECT id, kind || ':' || content FROM insights"))
    old = {b.id: (b.polarity, {text_of[member] for member in b.member_ids}) for b in behaviours}
    owners: dict[str, list[int]] = {}
    for behaviour_id, (_, texts) in old.items():
        for text in texts:
            owners.setdefault(text, []).append(behaviour_id)
    pairs: list[tuple[float, int, int]] = []
    for position, (polarity, members) in enumerate(clusters):
        own = {text_of[member] for member in members}
        for behaviour_id in {owner for text in own for owner in owners.get(text, ())}:
            other = old[behaviour_id][1]
            if old[behaviour_id][0] == polarity:
                pairs.append((-len(own & other) / len(own | other), behaviour_id, position))
    matched: dict[int, int] = {}
    taken: set[int] = set()
    for negative_overlap, behaviour_id, position in sorted(pairs):
        if -negative_overlap >= SAME_BEHAVIOUR and position not in matched and behaviour_id not in taken:
            matched[position] = behaviour_id
            taken.add(behaviour_id)
    return matched


def replace_behaviours(ledger: Ledger, drafts: Sequence[BehaviourDraft], policy_version: int) -> list[int | None]:
    """Make the drafts the active behaviours; returns each draft's id, None where it was left out."""
    old = read_behaviours(ledger.db)
    matches = match_behaviours(ledger.db, [(draft.polarity, draft.member_ids) for draft in drafts], old)
    support = [_count_problems(ledger, draft.member_ids) for draft in drafts]
    usable = [n for n, draft in enumerate(drafts) if draft.text or n in matches]
    kept = set(sorted(usable, key=lambda n: (-support[n], n))[:MAX_BEHAVIOURS])
    ids: list[int | None] = []
    for n, draft in enumerate(drafts):
        if n not in kept:
            ids.append(None)
        elif n in matches:
            _next_version(ledger, matches[n], draft, support[n], policy_version)
            ids.append(matches[n])
        else:
            values = {"polarity": draft.polarity, "content": draft.text, "support": support[n]}
            values |= {"evidence_sha": draft.evidence_sha, "policy_version": policy_version}
            ids.append(ledger.add(2, values, "abstraction", draft.member_ids))
    for behaviour in old:
        if behaviour.id not in ids:
            ledger.change(2, behaviour.id, {"status": "retired"}, "no cluster continues it")
    return ids


def _next_version(
    ledger: Ledger, behaviour_id: int, draft: BehaviourDraft, support: int, policy_version: int
) -> None:  # fmt: skip
    values: dict[str, object] = {"support": support}
    text, version = ledger.db.execute(
        "SELECT content, version FROM behaviours WHERE id = ?", (behaviour_id,)
    ).fetchone()
    if draft.text:
        values["evidence_sha"] = draft.evidence_sha
        if draft.text != text:
            values |= {"content": draft.text, "policy_version": policy_version}
            values |= {"version": version + 1, "embedding": None}
    ledger.change(2, behaviour_id, values, "abstraction", draft.member_ids)


def _count_problems(ledger: Ledger, insight_ids: Sequence[int]) -> int:
    marks = ", ".join("?" * len(insight_ids))
    return ledger.db.execute(
        f"SELECT count(DISTINCT problem_id) FROM insights WHERE id IN ({marks})", tuple(insight_ids)
    ).fetchone()[0]
