"""Which settings may change when a run is resumed, and which would make it another run.

A checkpoint holds the settings that its run used. Those that only say how fast, how long or on what a run goes on may
change and are used from then on; all others are refused, because no name would describe what comes out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pmd.config.schema import RunConfig
from pmd.config.values import shown
from pmd.errors import ConfigError

#: Keys and sections that may change.
CHANGEABLE = (
    "method", "cpu_threads", "wandb", "trace_every", "checkpoint_every_steps", "stop_on_collapse", "trainer",
    "model.attention", "model.gradient_checkpointing", "model.offload_activations", "model.layer_kernels",
    "model.trust_remote_code", "data.allow_modules",
    "optimizer.lr", "optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2", "optimizer.warmup_steps",
    "optimizer.schedule", "optimizer.max_grad_norm",
    "teacher.max_prompt_tokens", "objective.implementation",
    "data.path", "data.validation_path", "data.max_test",  # the tasks themselves are compared
    "rollouts.engine", "rollouts.vllm", "rollouts.server", "rollouts.tasks_per_step", "rollouts.group_size",
    "rollouts.updates_per_batch", "rollouts.prefetch", "rollouts.engine_batch", "rollouts.micro_batch_tokens",
    "rollouts.share_prefixes", "rollouts.max_prompt_tokens",
    "verifiers",
    "verification.every_epochs", "verification.every_steps", "verification.samples", "verification.final_samples",
    "verification.pass_at",
    "verification.memory_conditioned",
    "reflection.max_groups", "reflection.max_prompt_tokens", "memory.embedder_device",
    "reflection.behaviour_writer.base_url", "reflection.behaviour_writer.api_key_env",
    "reflection.behaviour_writer.timeout_s",
)  # fmt: skip
#: Why the rest of a section may not change.
REASONS = {
    "seed_everything": "the order of the tasks and every draw depend on it",
    "model": "the checkpoint holds that model's weights",
    "optimizer": "the checkpoint holds that optimizer's state",
    "data": "position and memory belong to those tasks",
    "rollouts": "scores before and after could not be compared",
    "verification": "scores before and after could not be compared",
}
METHOD = "from there on it would be another method"
#: Where a run is, and what it is resumed from: no settings of the run.
PLACES = ("run_dir", "ckpt_path")


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that differs between a checkpoint and the configuration that resumes it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}={shown(self.new)} (was {shown(self.old)})"

    @property
    def allowed(self) -> bool:
        """Whether a resumed run may use the new value."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in CHANGEABLE)


def find_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ, by key. Keys that an older version did not save had their default."""
    before = dict(_flat(asdict(RunConfig()))) | dict(_flat(saved))
    after = dict(_flat(now))
    keys = [key for key in after if key not in PLACES]
    keys += [key for key in before if key not in after and key.startswith("trainer.")]
    return [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def check_changes(changes: list[Change]) -> None:
    """Refuse to resume with settings that may not change.

    Raises:
        ConfigError: names each of them with its old value, and the changes that could be used.
    """
    refused = [change for change in changes if not change.allowed]
    if not refused:
        return
    problems = []
    for change in refused:
        reason = REASONS.get(change.key.split(".")[0], METHOD)
        problems.append(f"{change} cannot change when a run is resumed: {reason}; leave it, or start a new run.")
    usable = [str(change) for change in changes if change.allowed]
    if usable:
        problems.append(f"could be used, without the changes above: {', '.join(usable)}.")
    raise ConfigError(problems)


def check_same_model(changes: list[Change]) -> None:
    """Refuse to evaluate a checkpoint as another model than its run's; the folder of the model may have moved.

    Raises:
        ConfigError: names each setting that differs, with the checkpoint's value.
    """
    same = [change for change in changes if change.key.startswith("model.") and not change.allowed]
    problems = [
        f"{change} would make another policy of the checkpoint's weights; leave it as it was."
        for change in same
        if change.key not in ("model.path", "model.dtype")
    ]
    if problems:
        raise ConfigError(problems)


def check_end(trainer: Mapping[str, Any], epoch: int, step: int) -> None:
    """Refuse an end of training that lies before the checkpoint.

    Raises:
        ConfigError: names the key and the position of the checkpoint.
    """
    for key, done, unit in (("max_epochs", epoch, "epochs"), ("max_steps", step, "steps")):
        wanted = trainer.get(key)
        if isinstance(wanted, int) and 0 <= wanted < done:
            raise ConfigError(
                f"trainer.{key}={wanted} is below the {done} {unit} that the checkpoint has already done; raise it, or "
                "evaluate the checkpoint with `pmd test`."
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
