"""The engine's weights after a run that ends within a rollout batch."""

from lightning import Trainer
from torch.utils.data import DataLoader

from pmd.callbacks.sync import WeightSyncCallback
from pmd.config.schema import ModelConfig, RunConfig
from pmd.engines.hf import HFEngine
from pmd.module import PMDModule
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples


def test_the_last_step_is_synced_even_within_a_rollout_batch():
    """The run's last evaluation must not use weights of an earlier step."""
    module = PMDModule(RunConfig(model=ModelConfig(path="tiny")))
    engine = HFEngine(module.policy, module.tokenizer, 8)
    batches = FixedBatches(synthetic_examples(1, 2, Lengths(8, 12, 3, 3), 100), 8)
    trainer = Trainer(
        max_steps=3, callbacks=[WeightSyncCallback(engine, 4, None)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert engine.policy_version == module.policy_version == 3
