"""Engine and trainer take turns on the GPU; after every sync and wake-up the engine is checked before it is used."""

from dataclasses import replace

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pmd.callbacks.memory import MemoryCallback
from pmd.callbacks.sync import WeightSyncCallback
from pmd.callbacks.verification import VerificationCallback
from pmd.cli.run import build, callbacks_of
from pmd.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    RolloutsConfig,
    RunConfig,
    TinyWorldConfig,
    VLLMConfig,
)
from pmd.engines.hf import HFEngine
from pmd.engines.parity import ParityCheck
from pmd.run_dir import RunDir


class TakesTurns(HFEngine):
    """Notes every turn, and everything that is done out of turn."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asleep, self.unchecked, self.generating, self.checking = False, True, False, False
        self.turns, self.wrong, self.calls = [], [], []

    def generate(self, requests, sampling, role="student"):
        if self.asleep:
            self.wrong.append("generated while asleep")
        if self.unchecked and not self.checking:
            self.wrong.append("generated before the check")
        self.generating = True
        self.calls.append((role, len(requests)))
        yield from list(super().generate(requests, sampling, role))
        self.generating = False

    def sync(self, policy_version):
        super().sync(policy_version)
        self.turns.append("sync")
        self.unchecked = True

    def sleep(self):
        self.turns.append("sleep")
        self.asleep = True

    def wake(self):
        self.turns.append("wake")
        self.unchecked = self.unchecked or self.asleep
        self.asleep = False

    def trainer_computes(self, *_):
        if not (self.asleep or self.generating or self.checking):
            self.wrong.append("the trainer computed while the engine was awake")


class RecordedParity(ParityCheck):
    def measure(self, precision):
        self.engine.turns.append("parity")
        self.engine.checking = True
        gaps = super().measure(precision)
        self.engine.checking = self.engine.unchecked = False
        assert gaps["parity/max"] < 1e-4
        return gaps


@pytest.mark.parametrize("audit_groups", [0, 4])
def test_engine_and_trainer_take_turns(tmp_path, audit_groups):
    config = RunConfig(
        model=ModelConfig(path="tiny"),
        data=DataConfig(world=TinyWorldConfig(families=4, train_per_family=2, test_per_family=1)),
        rollouts=RolloutsConfig(tasks_per_step=4, group_size=2, max_new_tokens=16, updates_per_batch=2),
        memory=MemoryConfig(audit_groups=audit_groups),
        trace_every=0,
    )
    run = build(config, RunDir(tmp_path / "run"))
    engine = TakesTurns(run.module.policy, run.module.tokenizer, 64)
    prompts = [run.data.prompts.student(task) for task in run.tasks["train"][:2]]
    parity = RecordedParity(engine, run.module.policy, prompts, VLLMConfig(), run.module.layout.pad_id)
    with run.module.policy.weights("student") as model:
        model.register_forward_pre_hook(engine.trainer_computes)
    run.data.engine, run.reflector = engine, replace(run.reflector, engine=engine)
    callbacks = [c for c in callbacks_of(run) if not isinstance(c, (VerificationCallback, ModelCheckpoint))]
    for callback in callbacks:
        if isinstance(callback, WeightSyncCallback):
            callback.parity = parity
        if isinstance(callback, MemoryCallback) and callback.auditor is not None:
            callback.auditor = replace(callback.auditor, parity=parity)
    trainer = Trainer(
        max_epochs=2, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(run.module, run.data)
    assert engine.wrong == []
    once = ["wake", "sync", "parity"]
    batch = ["sleep", "sleep", *once]  # two updates of one rollout batch
    audit = ["sleep", "wake", "parity"] if audit_groups else []
    assert engine.turns == [*once, *2 * (2 * batch + audit)]
    groups = len(run.tasks["train"])
    reflected = [count for role, count in engine.calls if role == config.reflection.by]
    assert reflected[0] >= groups  # all groups of the epoch in one call
    assert len(reflected) <= 2 * 3  # in each epoch: the reflections, the malformed ones once more, the behaviours
