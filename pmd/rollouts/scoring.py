"""Log-probabilities of given completions behind given prompts, under any role of the policy. No gradient.

Enters: (prompt ids, completion ids) pairs. Leaves: per-token log-probs, one list a pair, in the pairs' order. Used
where text is judged rather than learnt from; training scores its batches in `PMDModule`.
"""

from collections.abc import Callable, Sequence

import torch

from pmd.models.logprobs import completion_hidden_states, output_head, token_terms
from pmd.models.policy import Policy, Role, eval_mode
from pmd.models.sequences import pad_sequences
from pmd.rollouts.micro_batches import split_by_tokens

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, completion ids
#: Per-token log-probs of each pair's completion, in nats.
Scorer = Callable[[Sequence[Pair], Role], list[list[float]]]


class PolicyScorer:
    """Scores with the training weights themselves, in micro-batches of bounded size."""

    def __init__(self, policy: Policy, pad_id: int, max_tokens: int):
        self.policy = policy
        self.pad_id = pad_id
        self.max_tokens = max_tokens

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair], role: Role) -> list[list[float]]:
        """Return per-token log-probs under `role`; a trust-region teacher scores as the initial policy."""
        scores: list[list[float]] = [[] for _ in pairs]
        with self.policy.weights(role) as model, eval_mode(model):
            device, head = model.device, output_head(model)
            for rows in split_by_tokens([len(prompt) + len(ids) for prompt, ids in pairs], self.max_tokens):
                sequences = pad_sequences([pairs[row] for row in rows], self.pad_id, device)
                hidden = completion_hidden_states(model, sequences)
                terms = token_terms(hidden, head, sequences.completion_ids)
                lengths = [len(pairs[row][1]) for row in rows]
                parts = torch.split(terms.student_logprobs.float().cpu(), lengths)
                for row, part in zip(rows, parts, strict=True):
                    scores[row] = part.tolist()
        return scores
