"""The embedded engine: generates with the training weights themselves, in a plain key-value-cache loop.

Log-probs are those of the policy at temperature 1, in nats, float32. Each request draws its own uniform numbers from
its seed and inverts the cumulative distribution, so a completion does not depend on how requests are batched.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pmd.engines.base import Request, Sampling
from pmd.errors import EngineError
from pmd.policy import Policy, eval_mode
from pmd.pretrained import hidden_ids, opened_thinking, stop_ids
from pmd.types import Completion, Role


class TextDecoder:
    """Turns the token ids of a completion into the text that verifiers and people read, alike for every engine.

    Special tokens that spell text, such as `<answer>` or `<think>`, stay; those that end a completion, pad it, or mark
    the turns of a chat do not. If the prompt ended by opening the thinking, the text begins with that mark.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.hidden_ids = hidden_ids(tokenizer, stop_ids)
        self.may_open = bool(tokenizer.chat_template)  # only a template opens the thinking

    def __call__(self, token_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """Return the text of a completion; the prompt matters only if it opened the thinking."""
        shown = [token_id for token_id in token_ids if token_id not in self.hidden_ids]
        opened = opened_thinking(self.tokenizer, prompt_ids) if self.may_open else ""
        return opened + cast(str, self.tokenizer.decode(shown))


class HFEngine:
    """Generates with the weights of `policy`, `batch` sequences at a time."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, batch: int):
        self.policy = policy
        self.tokenizer = tokenizer
        self.pad_id = cast(int, tokenizer.pad_token_id)
        self.batch = batch
        self.policy_version = 0
        with policy.weights("student") as model:
            self.stop_ids = stop_ids(model, tokenizer)
        self.decode = TextDecoder(tokenizer, self.stop_ids)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position, completion) batch by batch, shortest prompts first.

        Where the weights are divided among ranks, all of them generate at the same time, if only for no request: each
        gathers the weights for as long as it generates.
        """
        order = sorted(range(len(requests)), key=lambda position: len(requests[position].prompt_ids))
        with self.policy.gathered(role):
            for start in range(0, len(order), self.batch):
                positions = order[start : start + self.batch]
                with self.policy.weights(role) as model:
                    completions = self._generate_batch(model, [requests[p] for p in positions], sampling)
                yield from zip(positions, completions, strict=True)

    def sync(self, policy_version: int) -> None:
        """Note the new version; there is nothing to copy."""
        self.policy_version = policy_version

    def sleep(self) -> None:
        """Do nothing: no memory is held between calls."""

    def wake(self) -> None:
        """Do nothing: the engine is always ready."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    @torch.inference_mode()
    def _generate_batch(
        self, model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling
    ) -> list[Completion]:
        with eval_mode(model):
            token_ids, logprobs, lengths = self._decode(model, requests, sampling)
        rows = zip(requests, token_ids.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        return [self._completion(request, ids[:length], logps[:length]) for request, ids, logps, length in rows]

    def _decode(
        self, model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids [B, T], log-probs [B, T] and lengths [B]; positions beyond a row's length are padding."""
        device = next(model.parameters()).device
        input_ids, attention_mask = _left_pad([r.prompt_ids for r in requests], self.pad_id, device)
        uniforms = torch.from_numpy(
            np.stack([np.random.default_rng(r.seed).random(sampling.max_new_tokens) for r in requests])
        ).to(device)  # [B, max_new_tokens], float64
        eos = torch.tensor(self.stop_ids, device=device)
        done = torch.zeros(len(requests), dtype=torch.bool, device=device)
        lengths = torch.zeros(len(requests), dtype=torch.long, device=device)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache, all_ids, all_logprobs = None, [], []
        for t in range(sampling.max_new_tokens):
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()  # [B, V]
            next_ids = _sample(logits, uniforms[:, t], sampling)
            logprobs = logits.log_softmax(-1).gather(-1, next_ids[:, None])[:, 0]
            if not torch.isfinite(logprobs).all():
                raise EngineError(
                    f"token {t} has log-prob nan or inf under policy version {self.policy_version}; the weights have "
                    "diverged: resume from an earlier checkpoint with a lower optimizer.lr."
                )
            all_ids.append(next_ids)
            all_logprobs.append(logprobs)
            lengths += ~done
            done |= torch.isin(next_ids, eos)
            if done.all():
                break
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(requests), 1)], 1)
            input_ids, position_ids = next_ids[:, None], position_ids[:, -1:] + 1
        return torch.stack(all_ids, 1), torch.stack(all_logprobs, 1), lengths

    def _completion(self, request: Request, token_ids: list[int], logprobs: list[float]) -> Completion:
        return Completion(
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            text=self.decode(token_ids, request.prompt_ids),
            finish_reason="stop" if token_ids[-1] in self.stop_ids else "length",
            policy_version=self.policy_version,
        )


def _left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] and attention mask [B, L]; every sequence ends in the last column."""
    longest = max(len(s) for s in sequences)
    ids = torch.tensor([[pad_id] * (longest - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def _sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token id per row [B] by inverting the cumulative distribution at `uniform` [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / sampling.temperature).softmax(-1)  # [B, V]
    if sampling.top_p < 1:
        probs = _nucleus(probs, sampling.top_p)
    cumulative = _cumulative(probs)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _cumulative(probs: Tensor) -> Tensor:
    """Return the sums of each row up to each place, from the CPU if `trainer.deterministic` forbids those of a GPU."""
    where = "cpu" if torch.are_deterministic_algorithms_enabled() else probs.device
    return probs.to(where).cumsum(-1).to(probs.device)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose mass reaches `top_p`."""
    ranked, order = probs.sort(-1, descending=True)
    outside = _cumulative(ranked) - ranked >= top_p
    return torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(outside, 0.0))
