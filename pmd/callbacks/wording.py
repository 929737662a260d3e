"""Logs what a step's completions have in common beyond right and wrong: copies, loops, few answers, hedging.

Self-distillation can narrow a policy long before its reward falls: its attempts become copies of each other, and it
stops to hedge and to check (arXiv 2603.24472). The list of hedging words is our choice.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.types import Rollout

HEDGING = frozenset(
    {"wait", "hmm", "hm", "maybe", "perhaps", "possibly", "probably", "likely", "might", "unsure", "uncertain"}
    | {"alternatively", "however", "actually", "guess", "recheck", "double-check", "reconsider"}
)
EDGES = ".,;:!?\"'`()[]{}*"
NGRAM = 4
MAX_WORDS = 1_000  # of one completion, from its end, where loops are; more would take long


def describe(groups: Iterable[Sequence[Rollout]]) -> dict[str, float]:
    """Return the metrics of a step's groups of rollouts.

    - `rollout/repeated`: share of rollouts whose text is that of an earlier one of their group
    - `rollout/looping`: mean share of four words in a row that the same completion held before
    - `rollout/hedging`: share of hedging words among all words
    - `rollout/distinct_answers`: answers per group that differ; texts, where the verifier extracts no answers
    """
    groups = [list(group) for group in groups]
    rollouts = [rollout for group in groups for rollout in group]
    if not rollouts:
        return {}
    words = [rollout.completion.text.split()[-MAX_WORDS:] for rollout in rollouts]
    num_hedging = sum(word.strip(EDGES).casefold() in HEDGING for text in words for word in text)
    has_answers = any(rollout.verdict.answer is not None for rollout in rollouts)
    distinct = [
        len({r.verdict.answer for r in group} - {None}) if has_answers else len({r.completion.text for r in group})
        for group in groups
    ]
    return {
        "rollout/repeated": 1.0 - sum(len({r.completion.text for r in group}) for group in groups) / len(rollouts),
        "rollout/looping": fmean(map(_looping, words)),
        "rollout/hedging": num_hedging / max(1, sum(map(len, words))),
        "rollout/distinct_answers": fmean(distinct),
    }


def _looping(words: Sequence[str]) -> float:
    grams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class WordingCallback(Callback):
    """Logs `describe` of each step's rollouts."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Log the step's metrics."""
        groups: dict[str, list[Rollout]] = {}
        for example in batch.examples:
            groups.setdefault(example.rollout.group_id, []).append(example.rollout)
        pl_module.log_dict(describe(groups.values()), batch_size=1)
