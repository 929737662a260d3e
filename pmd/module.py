"""The LightningModule: student and teacher score the same rollouts, the objective compares them, one step follows.

    loss = policy_gradient * PG + distillation * divergence(student, teacher) + kl_weight * KL(student || reference)

Engines, prompts and memory live elsewhere; a `Batch` carries verified rollouts and their teacher contexts.
Optimisation is manual, so that a step's loss is reduced once over all its micro-batches.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor

from pmd.batch import Batch, BatchLayout, CompletionTokens, MicroBatch
from pmd.config.schema import ObjectiveConfig, RunConfig
from pmd.errors import AlignmentError
from pmd.losses.distillation import TokenTerms, importance_weights, policy_ratio
from pmd.losses.policy_gradient import per_token_policy_loss
from pmd.losses.reduce import weighted_sum
from pmd.policy import eval_mode, make_policy
from pmd.pretrained import load_base, load_tokenizer
from pmd.scoring import can_share_prefixes, packs_rows, score, teacher_part
from pmd.seeds import derive_seed
from pmd.trace import StepTrace


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss to differentiate, and its parts as plain numbers that add up over a step's micro-batches."""

    total: Float[Tensor, ""]
    parts: dict[str, float]


def combined_loss(terms: TokenTerms, tokens: CompletionTokens, policy_version: int, config: ObjectiveConfig) -> Loss:
    """Return one micro-batch's share of the step's loss: the mix of terms that `config` describes.

    Every term is a weighted sum over tokens (losses/reduce.py), so micro-batches add up to the step.
    """
    student, weights = terms.student_logprobs, tokens.token_weights
    on_policy = tokens.policy_versions == policy_version
    importance = importance_weights(student, tokens.sampling_logprobs, on_policy, config.tis_cap)
    total, parts = student.new_zeros(()), {}
    if config.policy_gradient > 0:
        per_token = per_token_policy_loss(
            student,
            importance.old_logprobs,
            tokens.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        policy_loss = weighted_sum(per_token * importance.tis, weights)
        total, parts["loss/policy_gradient"] = total + config.policy_gradient * policy_loss, policy_loss.item()
    if terms.per_token_divergence is not None:
        ratio = policy_ratio(student, importance.old_logprobs, config.importance_clip)
        per_token = terms.per_token_divergence * ratio * importance.tis * tokens.distillation_weights
        distillation = weighted_sum(per_token, weights)
        total, parts["loss/distillation"] = total + config.distillation * distillation, distillation.item()
    if terms.per_token_reference_kl is not None:
        kl = weighted_sum(terms.per_token_reference_kl, weights)
        total, parts["loss/reference_kl"] = total + config.kl_weight * kl, kl.item()
    parts["loss/total"] = total.item()
    if not total.requires_grad:  # no term is switched on: return a zero that backward accepts
        total = total + 0.0 * student.sum()
    gap = (student.detach() - tokens.sampling_logprobs).abs()
    parts["sampling/missing_logprobs"] = float((~importance.known).sum())
    parts["sampling/engine_gap"] = float(weighted_sum(torch.where(importance.known, gap, 0.0), weights))
    return Loss(total, parts)


class PMDModule(LightningModule):
    """Trains the student by distillation from its memory-conditioned teacher, by policy gradient, or by both."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave out what is loaded from model.path
        self.seed = config.seed_everything
        self.objective = config.objective
        self.optimizer_config = config.optimizer
        self.tokenizer = load_tokenizer(config.model)
        torch.manual_seed(derive_seed(self.seed, "adapters"))
        needs_reference = config.objective.kl_weight > 0
        base = load_base(config.model)
        self.policy = make_policy(base, config.model, config.teacher, needs_reference=needs_reference)
        self.layout = self._layout(config)
        self.policy_version = 0  # optimizer steps applied to the student
        self.trace: StepTrace | None = None  # collects the step's per-token record, if requested
        self.seconds = defaultdict[str, float](float)  # of the latest step, by part

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimizer step on all rollouts of `batch`."""
        torch.manual_seed(derive_seed(self.seed, "dropout", batch.step))
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        optimizer.zero_grad()
        totals = defaultdict[str, float](float)
        self.seconds.clear()
        for micro_batch in batch.micro_batches(self.layout, self.device):
            terms = self._score(micro_batch)
            loss = combined_loss(terms, micro_batch.tokens, self.policy_version, self.objective)
            with _Timer(self, "time/backward_s"):
                self.manual_backward(loss.total)
            for name, value in loss.parts.items():
                totals[name] += value
            totals["student/entropy"] += float((terms.entropy * micro_batch.tokens.token_weights).sum())
            if self.trace is not None:
                self.trace.add(micro_batch, terms)
        grad_norm = self._step(optimizer)
        self.log_dict(self._metrics(batch, totals) | {"student/grad_norm": grad_norm}, batch_size=1)
        self.log("loss", totals["loss/total"], prog_bar=True, logger=False, batch_size=1)
        self.log("reward", batch.metrics["rollout/reward"], prog_bar=True, logger=False, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Refresh a frozen teacher from the student if one is due (`teacher.refresh_epochs`)."""
        self.log("teacher/refreshed", float(self.policy.after_epoch(self.current_epoch)), batch_size=1)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch unchanged: tensors are created on the device, one micro-batch at a time."""
        return batch

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable weights, with a linear warm-up to a constant rate."""
        config = self.optimizer_config
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        adamw: Any = torch.optim.AdamW
        if config.kind == "adamw_8bit_paged":
            from bitsandbytes.optim.adamw import PagedAdamW8bit as adamw
        optimizer = adamw(trainable, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup_steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": warmup}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained weights and a separate teacher's weights; the rest is reloaded from model.path."""
        kept = self._own_state_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["policy_version"] = self.policy_version

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint from a different model or teacher instead of loading part of it."""
        self.check_checkpoint(checkpoint)
        self.policy_version = checkpoint["policy_version"]

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that the checkpoint holds exactly this module's tensors, by name and shape.

        Raises:
            AlignmentError: it comes from a different model or teacher.
        """
        names, state = self._own_state_names(), self.state_dict()
        own = {name: state[name].shape for name in names}
        found = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        different = {name for name in own | found if own.get(name) != found.get(name)}
        if different:
            raise AlignmentError(
                f"the checkpoint and this configuration differ in {len(different)} tensors, e.g. {min(different)}; "
                "use the model, finetune and teacher sections of the run that wrote it."
            )

    def _layout(self, config: RunConfig) -> BatchLayout:
        """Return how batches become tensors, limited to what the models support."""
        wanted = {"off": (), "teacher": ("teacher",), "both": ("student", "teacher")}[config.rollouts.share_prefixes]
        with self.policy.weights("student") as model:
            packs, able = packs_rows(model), {"student": can_share_prefixes(model)}
            with eval_mode(model):  # the teacher scores in eval mode
                able["teacher"] = can_share_prefixes(model)
        return BatchLayout(
            max_tokens=config.rollouts.micro_batch_tokens,
            pad_id=cast(int, self.tokenizer.pad_token_id),
            no_context_weight=config.objective.no_context_weight,
            reduction=config.objective.reduction,
            shared=frozenset(side for side in wanted if able[side]),
            packs=packs,
        )

    def _score(self, micro_batch: MicroBatch) -> TokenTerms:
        """Score the completions: the student, the teacher on its own prompt, and the reference policy if it is used."""
        teacher, reference = [], []
        if self.objective.distillation > 0:
            with _Timer(self, "time/teacher_s"):
                for role, weight in self.policy.teacher_mixture:
                    teacher.append(teacher_part(self.policy, role, micro_batch.teacher, weight))
        if self.objective.kl_weight > 0:
            with _Timer(self, "time/reference_s"):
                reference.append(teacher_part(self.policy, "reference", micro_batch.student))
        with _Timer(self, "time/student_s"):
            return score(
                self.policy, micro_batch.student, teacher=teacher, reference=reference, objective=self.objective
            )

    def _step(self, optimizer: torch.optim.Optimizer) -> float:
        """Clip the gradient, raise if it is not finite, and step; return its norm before clipping.

        A frozen policy discards its gradients first, so the step counts but changes no weights.
        """
        with _Timer(self, "time/optimizer_s"):
            trainable = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(trainable, self.optimizer_config.max_grad_norm)
            if not torch.isfinite(norm):
                raise AlignmentError(
                    f"gradient norm={norm.item()} at policy version {self.policy_version}; the step was not applied: "
                    "resume from checkpoints/last.ckpt with a lower optimizer.lr."
                )
            if not self.objective.update_policy:
                optimizer.zero_grad()
            optimizer.step()
            cast(Any, self.lr_schedulers()).step()
        if self.objective.update_policy:
            self.policy_version += 1
            self.policy.after_step()
        return norm.item()

    def _metrics(self, batch: Batch, totals: Mapping[str, float]) -> dict[str, float]:
        """Combine the step's losses with the metrics of rollouts, teacher contexts and timing."""
        contexts = [example.context for example in batch.examples]
        shown = {
            "teacher/share_with_context": sum(c.shows_anything for c in contexts) / max(1, len(contexts)),
            "teacher/items_shown": sum(len(c.items) for c in contexts) / max(1, len(contexts)),
            "teacher/items_dropped": float(sum(c.num_dropped for c in contexts)),
            "teacher/attempts_dropped": float(sum(c.attempt_dropped for c in contexts)),
        }
        return {k: float(v) for k, v in (batch.metrics | shown | dict(totals) | dict(self.seconds)).items()}

    def _own_state_names(self) -> set[str]:
        """Names of the tensors that a checkpoint must hold."""
        return {name for name in self.state_dict() if self.policy.is_own_state(name.removeprefix("policy."))}


class _Timer:
    """Adds the seconds spent inside `with` to the module's clock for this step."""

    def __init__(self, module: PMDModule, name: str):
        self.module, self.name = module, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)
        self.module.seconds[self.name] += time.perf_counter() - self.started
