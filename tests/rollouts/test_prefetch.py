"""With prefetch the next batch is generated during training: the same rollouts, one version behind."""

import threading
import time

import pytest

from pmd.cli.run import build
from pmd.config.schema import DataConfig, ModelConfig, RolloutsConfig, RunConfig, TinyWorldConfig
from pmd.engines.hf import HFEngine
from pmd.run_dir import RunDir


class OneAtATime(HFEngine):
    """Does not change weights in the middle of a batch, like engines with weights of their own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lock, self.started = threading.Lock(), threading.Semaphore(0)

    def generate(self, requests, sampling, role="student"):
        with self.lock:
            self.started.release()
            yield from list(super().generate(requests, sampling, role))

    def sync(self, policy_version):
        with self.lock:
            super().sync(policy_version)


def data_with(tmp_path, prefetch):
    config = RunConfig(
        model=ModelConfig(path="tiny"),
        data=DataConfig(world=TinyWorldConfig(families=4, train_per_family=3)),
        rollouts=RolloutsConfig(tasks_per_step=4, group_size=2, max_new_tokens=8, prefetch=prefetch),
    )
    run = build(config, RunDir(tmp_path / str(prefetch)))
    run.data.engine = OneAtATime(run.module.policy, run.module.tokenizer, 64)
    return run.data


def wait_for_the_next(data):
    """Wait until the batch after the current one is being generated."""
    assert data.engine.started.acquire(timeout=60)
    assert data.engine.started.acquire(timeout=60)
    data.engine.started.release()


def test_prefetching_generates_the_same_rollouts(tmp_path):
    def seen(prefetch):
        batches = data_with(tmp_path, prefetch).epoch(0)
        return [(b.step, e.rollout.rollout_id, e.rollout.completion.token_ids) for b in batches for e in b.examples]

    assert seen(True) == seen(False)


def test_rollouts_that_are_generated_while_the_policy_trains_are_timed(tmp_path):
    data, trained_s, found = data_with(tmp_path, prefetch=True), 0.1, []
    for batch in data.epoch(0):
        if batch.step < 2:
            wait_for_the_next(data)
        time.sleep(trained_s)
        found.append(tuple(batch.metrics[f"time/{part}_s"] for part in ("overlap", "rollout", "verify")))
    (first, *_), *later = found
    assert first < 0.05  # nobody trained yet
    for overlap, rollout, verify in later:
        assert 0.5 * min(rollout + verify, trained_s) < overlap <= rollout + verify


@pytest.mark.parametrize(("prefetch", "behind"), [(False, [0, 0, 0]), (True, [0, 1, 1])])
def test_versions_behind(tmp_path, prefetch, behind):
    data, found = data_with(tmp_path, prefetch), []
    for batch in data.epoch(0):
        if prefetch and batch.step < 2:
            wait_for_the_next(data)
        data.engine.sync(batch.step + 1)
        found.append(batch.metrics["rollout/versions_behind"])
    assert found == behind
