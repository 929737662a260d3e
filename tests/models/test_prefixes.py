"""Shared prompts: the same hidden states and gradients as computing every row whole, and fewer tokens."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.models.logprobs import completion_hidden_states
from pmd.models.prefixes import PrefixRun, can_share_prefixes, prefix_run, run_hidden_states
from pmd.rollouts.batch import Batch, BatchLayout, Example, pad_sequences
from pmd.teacher.context import TeacherContext
from pmd.types import Completion, Rollout, Verdict

CPU = torch.device("cpu")


def small_model(**changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **changes,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def ids(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, 40) for _ in range(length))


def example(group: int, number: int, prompt, shown, completion) -> Example:
    record = Completion(completion, (-1.0,) * len(completion), "", "stop", 0)
    rollout = Rollout(f"r{group}-{number}", f"g{group}", f"t{group}", prompt, record, Verdict(1.0, True, "ok"))
    return Example(rollout, 0.5, TeacherContext(rollout.rollout_id, shown))


def group_of(draw: random.Random, group: int, rows: int, shared: int) -> list[Example]:
    """Rollouts of one student prompt, and of teacher prompts that differ in their last few tokens."""
    prompt, shown = ids(draw, shared), ids(draw, shared + 30)
    return [
        example(group, number, prompt, shown + ids(draw, draw.randrange(5)), ids(draw, draw.randrange(1, 20)))
        for number in range(rows)
    ]


def test_shared_rows_equal_whole_rows_with_gradient():
    draw, model = random.Random(0), small_model()
    prompt = ids(draw, 50)
    pairs = [(prompt + ids(draw, n), ids(draw, m)) for n, m in ((0, 4), (3, 1), (1, 9))]
    pairs += [(ids(draw, 4), ids(draw, 5)), (ids(draw, 7), ids(draw, 2))]
    sequences = pad_sequences(pairs, 0, CPU)
    runs = [PrefixRun(0, 3, 49, 60), PrefixRun(3, 5, 0, 9)]
    results = []
    for way in (lambda: run_hidden_states(model, *sequences.tensors, runs),
                lambda: completion_hidden_states(model, *sequences.tensors)):  # fmt: skip
        model.zero_grad()
        hidden = way()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append([hidden.detach(), *(p.grad.clone() for p in model.model.parameters())])
    for shared, whole in zip(*results, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=2e-5)


def test_a_prefix_leaves_a_token_before_what_is_scored_and_must_pay():
    long = tuple(range(700))
    assert prefix_run([long, long, long], [720, 710, 701]) == PrefixRun(0, 3, 699, 720)
    assert prefix_run([long, (*long[:600], -1), long], [720, 610, 701]).prefix == 600
    assert prefix_run([long[:250], long[:250]], [270, 260]).prefix == 0, "249 tokens saved are too few"
    assert prefix_run([long, long, long], [9000, 710, 701]).prefix == 0, "699 of 9000 columns are too small a share"
    assert prefix_run([long, long, long], [720, 710, 701]).num_tokens == 699 + 3 * 21


@pytest.mark.parametrize("share", ["off", "teacher", "both"])
@pytest.mark.parametrize("max_tokens", [900, 2500, 100_000])
def test_every_rollout_is_in_one_micro_batch_and_runs_say_the_truth(share, max_tokens):
    draw = random.Random(1)
    rows = [*group_of(draw, 0, 8, 300), *group_of(draw, 1, 2, 10), *group_of(draw, 2, 6, 400)]
    draw.shuffle(rows)
    layout = BatchLayout(max_tokens, 0, 1.0, "token", share)
    seen, shared_rows = [], {"student": 0, "teacher": 0}
    for micro_batch in Batch(tuple(rows), 0, 0).micro_batches(layout, CPU):
        seen += [e.rollout.rollout_id for e in micro_batch.examples]
        assert micro_batch.student.completion_ids.tolist() == micro_batch.teacher.completion_ids.tolist()
        for side in ("student", "teacher"):
            sequences = getattr(micro_batch, side)
            assert sum(run.stop - run.start for run in sequences.prefix_runs) in (0, len(micro_batch.examples))
            for run in sequences.prefix_runs:
                block = sequences.input_ids[run.start : run.stop]
                assert (block[:, : run.prefix] == block[0, : run.prefix]).all()
                assert not sequences.attention_mask[run.start : run.stop, run.width :].any()
                shared_rows[side] += (run.stop - run.start) * (run.prefix > 0)
        assert (
            len(micro_batch.examples) == 1 or sum(r.num_tokens for r in micro_batch.teacher.prefix_runs) <= max_tokens
        )
    assert sorted(seen) == sorted(e.rollout.rollout_id for e in rows)
    if max_tokens == 100_000:  # smaller bounds split groups until sharing no longer pays
        assert shared_rows["teacher"] == (0 if share == "off" else 14)
        assert shared_rows["student"] == (14 if share == "both" else 0)


def test_models_that_cannot_share_compute_rows_whole():
    draw = random.Random(2)
    sliding = small_model(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert not can_share_prefixes(sliding)
    checkpointing = small_model()
    checkpointing.gradient_checkpointing_enable({"use_reentrant": False})
    assert can_share_prefixes(checkpointing)
    assert not can_share_prefixes(checkpointing.train())
    prompt = ids(draw, 50)
    sequences = pad_sequences([(prompt, ids(draw, 4)), (prompt, ids(draw, 6))], 0, CPU)
    shared = replace(sequences, prefix_runs=[PrefixRun(0, 2, 49, 56)])
    for model in (sliding, checkpointing):
        for with_gradient in (True, False):
            with torch.set_grad_enabled(with_gradient):
                torch.testing.assert_close(
                    run_hidden_states(model, *shared.tensors, shared.prefix_runs),
                    completion_hidden_states(model, *sequences.tensors),
                )
