"""A step that several ranks share out is the step of one: the same weights, whatever their number."""

import random
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from examples import make_example, make_rollout, random_ids, take_steps, tiny_module, trained
from lightning import Callback
from rank_processes import on_ranks

from pmd.batch import Example
from pmd.callbacks.checkpoint import VerifiedCheckpointIO
from pmd.callbacks.ranks import RanksCallback
from pmd.checkpoint_file import FORMAT
from pmd.config.schema import ObjectiveConfig, OptimizerConfig, TeacherConfig, VLLMConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import HFEngine
from pmd.engines.parity import ParityCheck
from pmd.engines.shared import LeadingEngine, LeadingScorer, follow
from pmd.errors import AlignmentError, EngineError, RankLost
from pmd.ranks import Ranks
from pmd.sharding import whole
from pmd.types import Completion

sys.path.append(str(Path(__file__).with_name("golden")))
from test_training_steps import truly_float64

METHODS = {
    "grpo": (ObjectiveConfig(policy_gradient=1.0, distillation=0.0, kl_weight=0.05), TeacherConfig()),
    "sdpo": (ObjectiveConfig(alpha=0.5, top_k=20, no_context_weight=0.0, reduction="sequence"), TeacherConfig("ema")),
    "pmd": (ObjectiveConfig(alpha="symmetric"), TeacherConfig()),
}
TOLERANCE = 1e-9
METRICS = ("student/grad_norm", "student/entropy")


def recorded_batch(step: int, num_groups: int = 3) -> list[Example]:
    """Groups of different sizes and lengths, so that ranks differ in their number of micro-batches."""
    draw, examples = random.Random(step), []
    for group in range(num_groups):
        prompt, shown = random_ids(draw, draw.randrange(4, 12)), random_ids(draw, draw.randrange(6, 20))
        for _ in range(draw.randrange(1, 4)):
            ids = random_ids(draw, draw.randrange(1, 9))
            logprobs = [-draw.random() * 4 for _ in ids]
            number, version = len(examples), draw.randrange(step + 1)
            rollout = make_rollout(
                number, ids, group=group, prompt_ids=prompt, logprobs=logprobs, policy_version=version
            )
            success = "yes" if draw.random() < 0.7 else None
            examples.append(make_example(rollout, shown, advantage=draw.random() - 0.5, success=success))
    return examples


class RunState(Callback):
    """Adds to checkpoints what a run does."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint |= {"pmd": {"format": FORMAT}, "RolloutDataModule": {}}


def weights_after(
    method: str,
    finetune: str,
    num_steps: int,
    ranks: Ranks | None = None,
    *,
    save_to: Path | None = None,
    resume_from: Path | None = None,
) -> dict[str, np.ndarray]:
    """Return what is trained, and the gradient's norm of the last step, after some steps in float64.

    Args:
        save_to: write a checkpoint there at the end.
        resume_from: take the last so many of 20 steps, from a checkpoint.
    """
    objective, teacher = METHODS[method]
    steps = range(num_steps) if resume_from is None else range(20 - num_steps, 20)
    with truly_float64():
        module = tiny_module(objective, teacher=teacher, optimizer=OptimizerConfig(lr=1e-3), finetune=finetune)
        module.double()
        module.layout = replace(module.layout, max_tokens=60)
        if ranks is not None:
            module.share_with(ranks)
        sharing = ranks if ranks is not None and ranks.shards else None
        batches, plugins = [recorded_batch(step) for step in steps], [VerifiedCheckpointIO(sharing)]
        trainer = take_steps(module, batches, RunState(), resume_from=resume_from, plugins=plugins)
        if save_to is not None:  # each rank's trainer takes itself for the first, so all of them write, as they must
            trainer.save_checkpoint(save_to)
        found = {name: whole(parameter.detach()).numpy() for name, parameter in trained(module).items()}
        metrics = trainer.callback_metrics
        return found | {name: metrics[name].double().numpy() for name in METRICS}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, tensor in expected.items():
        limit = TOLERANCE if name not in METRICS else 1e-6  # metrics are logged in float32
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=limit, err_msg=name)


def test_two_ranks_take_the_steps_of_one(tmp_path):
    alone = weights_after("sdpo", "lora", 3)
    for found in on_ranks(2, tmp_path, lambda ranks: weights_after("sdpo", "lora", 3, ranks)):
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_two_and_four_ranks_end_where_one_ends(method, finetune, shards, tmp_path):
    alone = weights_after(method, finetune, 20)
    for size in (2, 4):  # with four, one of them has no rollouts at all
        found = on_ranks(size, tmp_path, lambda ranks: weights_after(method, finetune, 20, ranks), shards=shards)
        for weights in found:
            assert_same(weights, alone)


def test_ranks_that_divide_the_weights_train_and_generate_as_one(tmp_path):
    def act(ranks: Ranks | None):
        module = tiny_module(METHODS["sdpo"][0], teacher=TeacherConfig("ema"))
        if ranks is not None:
            module.share_with(ranks)
        take_steps(module, [recorded_batch(step) for step in range(2)])
        engine = HFEngine(module.policy, module.tokenizer, 2)
        requests = [Request((1, 5, seed), seed) for seed in range(5)]
        own = requests if ranks is None else [requests, requests[:0]][ranks.rank]  # the other rank has none
        return [dict(engine.generate(own, Sampling(1.0, 6), role)) for role in ("student", "teacher")]

    alone, (first, second) = act(None), on_ranks(2, tmp_path, act, shards=True)
    assert second == [{}, {}]
    for expected, found in zip(alone, first, strict=True):
        assert {n: c.token_ids for n, c in found.items()} == {n: c.token_ids for n, c in expected.items()}
        for n, completion in expected.items():
            np.testing.assert_allclose(found[n].logprobs, completion.logprobs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_run_goes_on_on_another_number_of_ranks(finetune, tmp_path):
    """With a moving average as teacher, which the checkpoint holds too."""
    alone = weights_after("sdpo", finetune, 20)
    of_one, of_two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"

    def resumed(path: Path, ranks: Ranks | None = None):
        return weights_after("sdpo", finetune, 10, ranks, resume_from=path)

    weights_after("sdpo", finetune, 10, save_to=of_one)
    on_ranks(2, tmp_path, lambda ranks: weights_after("sdpo", finetune, 10, ranks, save_to=of_two), shards=True)
    assert_same(resumed(of_two), alone)
    for size, path in ((4, of_two), (2, of_one)):
        for found in on_ranks(size, tmp_path, partial(resumed, path), shards=True):
            assert_same(found, alone)


class CountingEngine:
    """Completes each request with its seed, and notes what it was asked for."""

    def __init__(self):
        self.policy_version, self.asked = 0, []

    def generate(self, requests, sampling, role="student"):
        self.asked += [request.seed for request in requests]
        yield from ((n, Completion((request.seed,), (-1.0,), "", "stop", 0)) for n, request in enumerate(requests))

    def sleep(self):
        self.asked.append("sleep")


def test_rank_0_leads_and_tells(tmp_path):
    """Requests of rank 0 are shared out; its results come back in order, and what only it knows is told to all."""

    def act(ranks: Ranks):
        engine, sampling, scored = CountingEngine(), Sampling(1.0, 1), []

        def scorer(pairs, role):
            scored.append((pairs, role))
            return [[-1.0]]

        if ranks.is_first:
            leading = LeadingEngine(engine, ranks)
            requests = [Request((1,), seed) for seed in range(5)]
            found = [completion.token_ids[0] for _, completion in leading.generate(requests, sampling)]
            assert LeadingScorer(scorer, ranks)([((1,), (2,))], "teacher") == [[-1.0]]
            released = leading.release({"n": 7.0})
        else:
            found, released = None, follow(engine, scorer, ranks)
        assert scored == [([((1,), (2,))], "teacher")]
        told = ranks.from_first(lambda: "only rank 0 is asked" if ranks.is_first else 1 / 0)
        failed = ""
        try:
            ranks.from_first(lambda: 1 / 0)
        except (RankLost, ZeroDivisionError) as error:
            failed = type(error).__name__
        groups = ranks.gathered([f"done {item}" for item in ranks.share(list("abc"))])
        return found, engine.asked, released, told, failed, groups, ranks.summed({"x": 1.0, f"y{ranks.rank}": 2.0})

    first, second = on_ranks(2, tmp_path, act)
    assert first[0] == [0, 1, 2, 3, 4]
    assert [first[1], second[1]] == [[0, 2, 4], [1, 3, "sleep"]]  # rank 0's audit puts its own to sleep
    assert [first[4], second[4]] == ["ZeroDivisionError", "RankLost"]
    for found in (first, second):
        assert found[2:4] == ({"n": 7.0}, "only rank 0 is asked")
        assert found[5:] == (["done a", "done b", "done c"], {"x": 2.0, "y0": 2.0, "y1": 2.0})


def test_callbacks_of_every_rank_can_monitor_what_the_first_one_logs():
    """The memory's metrics, which only rank 0 has; those of this epoch, and not what is left of the one before."""
    told, seen = {}, {}
    first, other = RanksCallback(lambda own: told.update(own) or told), RanksCallback(lambda own: told)
    module = SimpleNamespace(log_dict=lambda figures, **_: seen.update(figures))
    for insights in (3.0, 5.0):
        memory = {"memory/insights": torch.tensor(insights)}
        first.on_train_epoch_end(SimpleNamespace(callback_metrics={"loss": torch.tensor(1.0)} | memory), module)
        assert seen == ({} if insights == 3.0 else {"memory/insights": 3.0})
        other.on_train_epoch_end(SimpleNamespace(callback_metrics={"loss": torch.tensor(1.0)} | seen), module)
        assert seen == {"memory/insights": insights}


class StaleEngine(HFEngine):
    """Returns log-probs of other weights than the trainer's."""

    def generate(self, requests, sampling, role="student"):
        for position, completion in super().generate(requests, sampling, role):
            yield position, replace(completion, logprobs=tuple(logprob - 1.0 for logprob in completion.logprobs))


def test_the_engine_of_each_rank_is_checked(tmp_path):
    def act(ranks: Ranks) -> None:
        module, config = tiny_module(), VLLMConfig(parity_completions=2, parity_tokens=4, parity_bound=1e-4)
        engines = [kind(module.policy, module.tokenizer, 2) for kind in (HFEngine, (HFEngine, StaleEngine)[ranks.rank])]
        good, bad = (ParityCheck(engine, module.policy, [(1, 5)], config, 0, ranks) for engine in engines)
        assert good.measure(nullcontext())["parity/max"] < 1e-4
        with pytest.raises(EngineError, match=r"differ by 0\.5 nats per token on average"):
            bad.measure(nullcontext())
        ranks.num_generating = 1  # as with servers: rank 0 alone asks
        assert bad.measure(nullcontext())["parity/max"] < 1e-4

    on_ranks(2, tmp_path, act)


def test_a_rank_that_waits_too_long_says_for_what(tmp_path):
    def act(ranks: Ranks) -> str | None:
        ranks.objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=0.3))
        if ranks.is_first:
            with pytest.raises(RankLost) as raised:
                ranks.all("here")
            return str(raised.value)
        time.sleep(0.6)  # it hangs
        return None

    said, _ = on_ranks(2, tmp_path, act)
    assert re.match(r"rank 0 of 2 was gathering for \d s and has lost another rank, which has ended or hangs", said)


def test_ranks_that_hold_other_weights_are_refused(tmp_path):
    def act(ranks: Ranks) -> str:
        with pytest.raises(AlignmentError, match="the weights differ between rank 0 and rank 1") as raised:
            ranks.check_equal([torch.tensor([1.0, ranks.rank])], "the weights")
        return str(raised.value)

    assert len(on_ranks(2, tmp_path, act)) == 2
