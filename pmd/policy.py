"""The policy in its three roles, student, teacher and reference: `with policy.weights("teacher") as model: ...`.

Inside the `with`, the model acts as that role. Full fine-tuning keeps frozen copies; with LoRA all roles are
adapters on one base (the reference policy is the base with adapters off), so no second copy of the weights exists.

Deviation (our choice, the paper is silent): an EMA of LoRA factors A and B averages the factors, which is not the
average of their products BA.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmd import sharding
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.ranks import Ranks
from pmd.types import Role


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode: no dropout, and no gradient checkpointing, which would drop the key-value cache."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Policy(nn.Module):
    """The weights of one run in their three roles. Subclasses say where each role's weights live."""

    def __init__(self, teacher: TeacherConfig):
        super().__init__()
        self.kind = teacher.kind
        self.ema_rate = teacher.ema_rate
        self.refresh_epochs = teacher.refresh_epochs
        self.keeps_own_teacher = teacher.has_own_weights
        self.trust_region_rate = teacher.trust_region_rate
        self.ranks: Ranks | None = None  # those that hold a part of the weights each

    @property
    def teacher_mixture(self) -> list[tuple[Role, float]]:
        """Roles whose logits, weighted and summed, are the teacher's logits."""
        if self.kind == "trust_region":
            return [("reference", 1.0 - self.trust_region_rate), ("student", self.trust_region_rate)]
        return [("teacher", 1.0)]

    def resolve(self, role: Role) -> Role:
        """Map the teacher to the role with its weights. A trust-region teacher generates as the reference policy."""
        if role != "teacher" or self.keeps_own_teacher:
            return role
        return "student" if self.kind == "live" else "reference"

    @contextmanager
    def weights(self, role: Role) -> Iterator[PreTrainedModel]:
        """Yield the model that acts as `role`. The student is always in training mode."""
        raise NotImplementedError
        yield

    def models(self) -> list[PreTrainedModel]:
        """Return the causal LMs whose weights exist, without any adapters around them."""
        raise NotImplementedError

    def model_of(self, role: Role) -> PreTrainedModel:
        """Return the one of `models` that acts as `role`."""
        raise NotImplementedError

    def adapters(self) -> list[nn.Parameter]:
        """Return the weights of all adapters, which every rank holds whole."""
        return []

    def shard(self, ranks: Ranks) -> None:
        """Divide the weights among the ranks, on their devices; see `sharding.shard`."""
        self.ranks, mesh = ranks, ranks.mesh()
        for model in self.models():
            sharding.shard(model, mesh, self.adapters(), ranks.shard_dtype)
        if mesh.device_type == "cuda":
            self.to(torch.device("cuda", torch.cuda.current_device()))  # adapters, and what is computed

    @contextmanager
    def gathered(self, role: Role) -> Iterator[None]:
        """Hold all weights of `role` here; if they are divided, all ranks enter together."""
        if self.ranks is None:
            yield
            return
        with self.ranks.naming_loss("gathering the weights"), sharding.gathered(self.model_of(self.resolve(role))):
            yield

    def whole_weights(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield a model's weights by name. Those that ranks divide are gathered one by one, by all ranks together."""
        for name, weight in model.state_dict().items():
            with nullcontext() if self.ranks is None else self.ranks.naming_loss("gathering the weights"):
                gathered = sharding.whole(weight)
            yield name, gathered

    def teacher_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield corresponding (teacher, student) tensors; of weights that are divided, this rank's parts."""
        raise NotImplementedError

    def is_own_state(self, name: str) -> bool:
        """Whether the state dict's tensor `name` belongs in a checkpoint: it cannot be reloaded from `model.path`."""
        raise NotImplementedError

    @torch.no_grad()
    def after_rollout_batch(self) -> None:
        """Move an EMA teacher towards the student: teacher <- (1 - rate) teacher + rate student.

        Once per rollout batch, as SDPO does: with 32 updates a batch and a rate of 5 %, an average that moved after
        every update would follow the student by four fifths a batch.
        """
        if self.kind == "ema":
            for teacher, student in self.teacher_pairs():
                teacher.lerp_(student.to(teacher.dtype), self.ema_rate)

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> bool:
        """Copy the student into a frozen teacher if due after `epoch` (counted from 0); return whether it was."""
        due = self.kind == "frozen" and self.refresh_epochs is not None and (epoch + 1) % self.refresh_epochs == 0
        if due:
            for teacher, student in self.teacher_pairs():
                teacher.copy_(student)
        return due


class FullPolicy(Policy):
    """All weights are trained; the teacher and the reference policy are frozen copies, made only where needed."""

    def __init__(self, model: PreTrainedModel, teacher: TeacherConfig, *, needs_reference: bool):
        super().__init__(teacher)
        self.student = model.requires_grad_(True).train()  # models are loaded in eval mode, and Lightning keeps it
        needs_reference |= self.resolve("teacher") == "reference"
        self.reference = _frozen_copy(model) if needs_reference else None
        self.teacher = _frozen_copy(model) if self.keeps_own_teacher else None

    @contextmanager
    def weights(self, role: Role) -> Iterator[PreTrainedModel]:
        """Yield the student or a frozen copy."""
        yield self.model_of(self.resolve(role))

    def models(self) -> list[PreTrainedModel]:
        """Return the student and the frozen copies."""
        return [model for model in (self.student, self.teacher, self.reference) if model is not None]

    def model_of(self, role: Role) -> PreTrainedModel:
        """Return the student or a frozen copy."""
        return cast(PreTrainedModel, getattr(self, role))

    def teacher_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (teacher, student) parameters."""
        assert self.teacher is not None
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            yield sharding.own_part(teacher), sharding.own_part(student)

    def is_own_state(self, name: str) -> bool:
        """Everything but the copy of the reference policy."""
        return not name.startswith("reference.")

    def train(self, mode: bool = True) -> "FullPolicy":
        """Set the student's mode; the frozen copies stay in eval mode."""
        self.training = mode
        self.student.train(mode)
        return self


class AdapterPolicy(Policy):
    """LoRA adapters on one frozen base. `student` is trained; the base alone is the reference policy."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig, teacher: TeacherConfig):
        from peft import LoraConfig, get_peft_model

        from pmd.adapters import multiply_in_base_dtype

        super().__init__(teacher)
        lora = LoraConfig(
            r=config.lora_rank,
            # PEFT's type is int, but any number works; a whole number is saved as an int in the adapter's config.
            lora_alpha=cast(int, config.lora_alpha if config.lora_alpha % 1 else int(config.lora_alpha)),
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.peft_model = get_peft_model(model, lora, adapter_name="student")
        if self.keeps_own_teacher:
            self.peft_model.add_adapter("teacher", lora)
            for own, student in self.teacher_pairs():
                own.data.copy_(student)
        multiply_in_base_dtype(self.peft_model)
        self._activate("student")
        self.peft_model.train()

    @contextmanager
    def weights(self, role: Role) -> Iterator[PreTrainedModel]:
        """Activate the adapter of `role`, or none; the student is active again afterwards, ready for backward."""
        resolved = self.resolve(role)
        model = cast(PreTrainedModel, self.peft_model)
        if resolved == "student":
            yield model
            return
        with eval_mode(self.peft_model):
            try:
                if resolved == "reference":
                    with self.peft_model.disable_adapter():
                        yield model
                else:
                    self._activate("teacher")
                    yield model
            finally:
                self._activate("student")

    def models(self) -> list[PreTrainedModel]:
        """Return the base."""
        return [cast(PreTrainedModel, self.peft_model.get_base_model())]

    def model_of(self, role: Role) -> PreTrainedModel:
        """Return the base, whatever the role."""
        return cast(PreTrainedModel, self.peft_model.get_base_model())

    def adapters(self) -> list[nn.Parameter]:
        """Return the weights of all adapters."""
        return [parameter for name, parameter in self.named_parameters() if self.is_own_state(name)]

    def teacher_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (teacher, student) adapter tensors, matched by name."""
        parameters = dict(self.peft_model.named_parameters())
        for name, teacher in parameters.items():
            if ".teacher." in name:
                yield teacher, parameters[name.replace(".teacher.", ".student.")]

    def is_own_state(self, name: str) -> bool:
        """The adapters, not the base."""
        return ".student." in name or ".teacher." in name

    def _activate(self, adapter: str) -> None:
        """Switch adapters. The teacher is set for inference, or PEFT would make it trainable."""
        self.peft_model.set_adapter(adapter, inference_mode=adapter == "teacher")
        for name, parameter in self.peft_model.named_parameters():
            parameter.requires_grad_(".student." in name)


def make_policy(
    model: PreTrainedModel, config: ModelConfig, teacher: TeacherConfig, *, needs_reference: bool = False
) -> Policy:
    """Wrap a loaded base model as `config.finetune` says; `needs_reference` keeps the reference policy for a KL."""
    if config.finetune == "full":
        return FullPolicy(model, teacher, needs_reference=needs_reference)
    return AdapterPolicy(model, config, teacher)


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in eval mode; torch does not copy that a layer is compiled (`model.layer_kernels: compiled`)."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for layer, original in zip(frozen.modules(), model.modules(), strict=True):
        if original._compiled_call_impl is not None:
            layer.compile(dynamic=True)
    return frozen
