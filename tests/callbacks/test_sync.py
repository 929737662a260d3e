"""When the engine gets the student's weights."""

from examples import fit_batches, tiny_module, varied_examples
from lightning import Callback

from pmd.batch import Batch
from pmd.callbacks.sync import WeightSyncCallback
from pmd.engines.hf import HFEngine


class Synced(Callback):
    """Notes the version of the engine's weights after each step."""

    def __init__(self, engine: HFEngine):
        self.engine, self.versions = engine, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.versions.append(self.engine.policy_version)


def versions_after(is_last: list[bool], *callbacks: Callback, **limits: int) -> list[int]:
    """Train on batches of which some are the last of their rollout batch; return the engine's version after each."""
    module = tiny_module()
    engine = HFEngine(module.policy, module.tokenizer, 8)
    metrics = {"rollout/reward": 0.5, "rollout/mean_length": 5.0}
    batches = [Batch(tuple(varied_examples(2)), 0, step, metrics, last) for step, last in enumerate(is_last)]
    synced = Synced(engine)
    fit_batches(module, batches, WeightSyncCallback(engine, None), synced, *callbacks, **limits)
    return synced.versions


def test_the_engine_is_synced_after_the_last_step_of_each_rollout_batch():
    """Rollout batches of two, three and one steps: a resumed run may change `rollouts.updates_per_batch`."""
    assert versions_after([False, True, False, False, True, True]) == [0, 2, 2, 2, 5, 6]


def test_seconds_of_a_sync_are_logged_once():
    """Costs are sums over the rows, and Lightning repeats a value until it is logged again."""
    seen = []

    class Logged(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(float(trainer.logged_metrics.get("time/sync_s", 0.0)))

    versions_after([True, False, False], Logged())
    assert seen[1] > 0.0 == seen[2]


def test_the_last_step_is_synced_even_within_a_rollout_batch():
    """The run's last evaluation must not use weights of an earlier step."""
    assert versions_after([False] * 8, max_steps=3) == [0, 0, 3]
