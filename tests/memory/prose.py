"""Insights in prose, in ten topics, and what a memory makes of them under some embedder."""

import json
from collections import Counter
from pathlib import Path

from memory_world import make_task

from pmd.config.schema import MemoryConfig
from pmd.memory.embed import Embedder
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer

DATA = json.loads((Path(__file__).parent / "data" / "prose_insights.json").read_text(encoding="utf-8"))
TOPICS: dict[str, list[str]] = DATA["topics"]
TOPIC_OF = {text: topic for topic, texts in TOPICS.items() for text in texts}


def cluster_prose(path: Path, embedder: Embedder, **config) -> tuple[list[list[str]], MemoryStore]:
    """Learn each insight on a task of its own; return the topics of each cluster's insights, and the open store."""
    store = MemoryStore.open(path, embedder=embedder, config=MemoryConfig(**config))
    with open_writer(store) as writer:
        for number, text in enumerate(TOPIC_OF):
            writer.add_insight(writer.add_task(make_task(f"t{number}")), "strategy", text, policy_version=0)
        assert writer.merge(range(1, 1 + len(TOPIC_OF))) == 0
        clusters = writer.clusters()
    return [[TOPIC_OF[insight.text] for insight in cluster.insights] for cluster in clusters], store


def purity(clusters: list[list[str]]) -> float:
    """Return the share of clustered insights that are of their cluster's most frequent topic."""
    return sum(max(Counter(cluster).values()) for cluster in clusters) / sum(map(len, clusters))


def merge_pairs(store: MemoryStore, pairs: list[list[str]]) -> list[bool]:
    """Learn each pair on a task of its own; return whether its two insights became one."""
    merged = []
    with open_writer(store) as writer:
        for number, pair in enumerate(pairs):
            task_row = writer.add_task(make_task(f"pair{number}"))
            for text in pair:
                writer.add_insight(task_row, "strategy", text, policy_version=0)
            merged.append(writer.merge([task_row]) == 1)
            for insight in store.insights():
                if insight.task_row == task_row:
                    writer.set_status(1, insight.id, "retired", "the next pair is compared with the prose alone")
    return merged
