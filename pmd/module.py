"""The LightningModule: student and teacher score the same rollouts, the objective compares them, one step follows.

    loss = policy_gradient * PG + distillation * divergence(student, teacher) + kl_weight * KL(student || reference)

Engines, prompts and memory live elsewhere; a `Batch` carries verified rollouts and their teacher contexts.
Optimisation is manual, so that a step's loss is reduced once over all its micro-batches.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pmd.batch import Batch, BatchLayout, CompletionTokens, MicroBatch
from pmd.checkpoint_shards import divided, filled
from pmd.config.schema import MICRO_BATCH_TOKENS, ObjectiveConfig, OptimizerConfig, RunConfig
from pmd.errors import AlignmentError, TrainingError
from pmd.losses.distillation import TokenTerms, importance_weights, policy_ratio
from pmd.losses.policy_gradient import per_token_policy_loss
from pmd.losses.reduce import clip_tokens, weighted_sum
from pmd.offload import OffloadedActivations
from pmd.policy import eval_mode, make_policy
from pmd.pretrained import load_base, load_tokenizer
from pmd.ranks import Ranks
from pmd.scoring import can_share_prefixes, packs_rows, score, shares_packed_prefixes, teacher_part
from pmd.seeds import derive_seed
from pmd.sharding import whole
from pmd.trace import StepTrace

log = logging.getLogger(__name__)
#: How many numbers of each weight are compared between ranks before the weights are divided.
CHECKED = 1024


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
        divergence = clip_tokens(terms.per_token_divergence, config.token_clip)
        per_token = divergence * ratio * importance.tis * tokens.distillation_weights
        distillation = weighted_sum(per_token, weights)
        total, parts["loss/distillation"] = total + config.distillation * distillation, distillation.item()
        if config.token_clip is not None:
            clipped = (terms.per_token_divergence.detach() > config.token_clip).to(weights.dtype)
            parts["student/clipped_tokens"] = float(weighted_sum(clipped, weights))
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


def rate_factor(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Return what the learning rate is multiplied by in `step`, counted from 0, of a run of `num_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    return 1.0 - progress if config.schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm over all of them, on all ranks; return the norm before."""
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def page_again(optimizer: Any) -> None:
    """Move a paged optimizer's state, which loading has put on the GPU for good, to memory that may leave the GPU."""
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            state[name] = optimizer.get_state_buffer(parameter, dtype=state[name].dtype).copy_(state[name])


class PMDModule(LightningModule):
    """Trains the student by distillation from its memory-conditioned teacher, by policy gradient, or by both."""

    def __init__(self, config: RunConfig, base: PreTrainedModel | None = None):
        """Wrap `base`, or load it if there is none."""
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave out what is loaded from model.path
        self.seed = config.seed_everything
        self.objective = config.objective
        self.optimizer_config = config.optimizer
        self.offloads = config.model.offload_activations
        self.tokenizer = load_tokenizer(config.model)
        torch.manual_seed(derive_seed(self.seed, "adapters"))
        needs_reference = config.objective.kl_weight > 0
        if base is None:
            base = load_base(config.model)
        self.policy = make_policy(base, config.model, config.teacher, needs_reference=needs_reference)
        self.layout = self._layout(config)
        self.policy_version = 0  # optimizer steps applied to the student
        self.num_steps: int | None = None  # of the whole run, for the schedule; None asks the trainer
        self.num_skipped = 0  # steps in a row, up to the latest, whose losses or gradient were not finite
        self.ranks: Ranks | None = None  # of a run on several devices
        self.trace: StepTrace | None = None  # collects the step's per-token record, if requested
        self.seconds = defaultdict[str, float](float)  # of the latest step, by part

    def cpu(self) -> "PMDModule":
        """Leave the weights where they are: Lightning calls this after training, and the evaluation uses them."""
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimizer step on all rollouts of `batch`."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        self.seconds.clear()
        totals = self._accumulate_in_memory(batch, optimizer)
        if self.ranks is not None:
            totals = self._sum_over_ranks(self.ranks, totals)
        grad_norm = self._step(batch, optimizer, totals)
        skipped = {"student/skipped_step": float(self.num_skipped > 0)}
        self.log_dict(self._metrics(batch, totals) | skipped | {"student/grad_norm": grad_norm}, batch_size=1)
        self.log("loss", totals["loss/total"], prog_bar=True, logger=False, batch_size=1)
        self.log("reward", batch.metrics["rollout/reward"], prog_bar=True, logger=False, batch_size=1)

    def _accumulate(self, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Leave the gradient of the step's loss in the weights; return the loss's parts."""
        torch.manual_seed(derive_seed(self.seed, "dropout", batch.step))
        optimizer.zero_grad()
        totals = defaultdict[str, float](float)
        for micro_batch in batch.micro_batches(self.layout, self.device):
            terms = self._score(micro_batch)
            loss = combined_loss(terms, micro_batch.tokens, self.policy_version, self.objective)
            with _Timer(self, "time/backward_s"):
                self.manual_backward(loss.total)
            for name, value in loss.parts.items():
                totals[name] += value
            totals["student/entropy"] += float((terms.entropy * micro_batch.tokens.token_weights).sum())
            if self.trace is not None and micro_batch.examples:
                self.trace.add(micro_batch, terms)
        return totals

    def share_with(self, ranks: Ranks) -> None:
        """Compute this rank's share of each step from now on; losses and gradients are summed over all ranks.

        If the ranks divide the weights, they are divided now; all ranks make the same number of passes, each over
        whole rows.
        """
        self.ranks = ranks
        self.layout = replace(self.layout, rank=ranks.rank, num_ranks=ranks.size)
        if ranks.shards:
            beginnings = (parameter.detach().flatten()[:CHECKED] for parameter in self.parameters())
            ranks.check_equal(beginnings, "the weights")
            self.policy.shard(ranks)
            shared = self.layout.shared if self.layout.packs else frozenset[str]()
            self.layout = replace(self.layout, in_step=True, shared=shared)

    def _sum_over_ranks(self, ranks: Ranks, totals: Mapping[str, float]) -> dict[str, float]:
        """Sum the step's gradient and the parts of its loss over all ranks, of which some may have had no rollouts.

        Gradients of weights that are divided have been summed in the backward passes.
        """
        with _Timer(self, "time/sum_gradients_s"):
            ranks.sum_gradients(self._trained_whole())
            return ranks.summed(totals)

    def _trained_whole(self) -> Iterator[nn.Parameter]:
        """Yield the trainable weights that every rank holds whole."""
        yield from (p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor))

    def on_train_epoch_end(self) -> None:
        """Refresh a frozen teacher from the student if one is due (`teacher.refresh_epochs`)."""
        if not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the run ends within the epoch
        self.log("teacher/refreshed", float(self.policy.after_epoch(self.current_epoch)), batch_size=1)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch unchanged: tensors are created on the device, one micro-batch at a time."""
        return batch

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable weights, with a linear warm-up and the schedule after it."""
        config = self.optimizer_config
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        adamw: Any = torch.optim.AdamW
        if config.kind == "adamw_8bit_paged":
            from bitsandbytes.optim.adamw import PagedAdamW8bit as adamw
        optimizer = adamw(trainable, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        num_steps = self._num_steps()
        self._schedule = lambda step: rate_factor(step, config, num_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Begin with the configured rate: a resumed optimizer remembers the one that it last used."""
        if self.ranks is not None:
            self.ranks.check_equal(self._trained_whole(), "the trainable weights")
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # a callback, such as StochasticWeightAveraging, has the rates of its own
        for group in scheduler.optimizer.param_groups:
            group["lr"] = self.optimizer_config.lr * self._schedule(scheduler.last_epoch)
        if self.optimizer_config.kind == "adamw_8bit_paged":
            page_again(scheduler.optimizer)

    def _num_steps(self) -> int:
        """Return the optimizer steps of the whole run, if the schedule asks for them."""
        if self.optimizer_config.schedule == "constant":
            return 0
        return int(self.trainer.estimated_stepping_batches) if self.num_steps is None else self.num_steps

    def _set_rates(self, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Put the configured rates into the saved states of the optimizer and its schedule."""
        config = self.optimizer_config
        for group in optimizer["param_groups"]:
            group["initial_lr"], group["weight_decay"] = config.lr, config.weight_decay
            group["betas"] = (config.beta1, config.beta2)
        schedule["base_lrs"] = [config.lr for _ in schedule["base_lrs"]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained weights and a separate teacher's weights; the rest is reloaded from model.path."""
        kept = self._own_state_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["policy_version"] = self.policy_version

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint from a different model or teacher instead of loading part of it.

        The optimizer's rates are the configuration's, not those that the checkpoint was written with.
        """
        self.check_checkpoint(checkpoint)
        self.policy_version = checkpoint["policy_version"]
        for optimizer, schedule in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
            self._set_rates(optimizer, schedule)
        self._complete(checkpoint)

    def _complete(self, checkpoint: dict[str, Any]) -> None:
        """Read what a checkpoint keeps in other files; where ranks divide the weights, leave this rank's parts only."""
        has_shards = "shards" in checkpoint.get("pmd", {})
        if not has_shards and self.policy.ranks is None:
            return
        trained = [p for p in self.parameters() if p.requires_grad]
        like = {f"state_dict.{name}": tensor for name, tensor in self.state_dict().items()}
        for n, optimizer in enumerate(checkpoint["optimizer_states"]):
            for number, moments in optimizer["state"].items():
                # The number of steps has no dimension.
                names = [name for name, value in moments.items() if isinstance(value, Tensor) and value.dim()]
                like |= {f"optimizer_states.{n}.state.{number}.{name}": trained[number] for name in names}
        if has_shards:
            checkpoint.update(filled(checkpoint, like, self.policy.ranks))
        if self.policy.ranks is not None:
            checkpoint.update(divided(checkpoint, like))

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
        tokens = config.rollouts.micro_batch_tokens
        wanted = {"off": (), "teacher": ("teacher",), "both": ("student", "teacher")}[config.rollouts.share_prefixes]
        with self.policy.weights("student") as model:
            if packs := packs_rows(model):
                able = dict.fromkeys(("student", "teacher"), shares_packed_prefixes(model))
            else:
                able = {"student": can_share_prefixes(model)}
                with eval_mode(model):  # the teacher scores in eval mode
                    able["teacher"] = can_share_prefixes(model)
        return BatchLayout(
            max_tokens=MICRO_BATCH_TOKENS if tokens == "auto" else tokens,
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
        with _Timer(self, "time/student_s"), self._saving():
            return score(
                self.policy, micro_batch.student, teacher=teacher, reference=reference, objective=self.objective
            )

    def _saving(self) -> AbstractContextManager[object]:
        """Return the context in which what the backward pass needs is saved."""
        return OffloadedActivations(self.parameters()) if self.offloads else nullcontext()

    def _accumulate_in_memory(self, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Accumulate the gradient; where memory runs out, begin again with micro-batches of half the size.

        Raises:
            TrainingError: memory runs out although each rollout has a micro-batch of its own.
        """
        while True:
            try:
                with self._naming_lost_ranks():
                    return self._accumulate(batch, optimizer)
            except torch.OutOfMemoryError as error:
                cause = str(error).splitlines()[0]
                if self.layout.in_step:  # the other ranks are in the middle of the same pass
                    raise TrainingError(
                        f"out of memory at step {batch.step} ({cause}); lower rollouts.micro_batch_tokens "
                        f"({self.layout.max_tokens}), or use more devices."
                    ) from error
            optimizer.zero_grad()  # outside of `except`: the error would keep the tensors of the failed pass alive
            if self.trace is not None:
                self.trace.records.clear()
            self._halve_micro_batches(batch, cause)

    def _naming_lost_ranks(self) -> AbstractContextManager[None]:
        """Return the context of what needs the other ranks if they divide the weights."""
        return nullcontext() if self.ranks is None else self.ranks.naming_loss("computing a step")

    def _halve_micro_batches(self, batch: Batch, cause: str) -> None:
        """Use micro-batches of half the size from now on, as long as the run goes on."""
        tokens, longest = self.layout.max_tokens, batch.longest_sequence
        if tokens <= longest:
            raise TrainingError(
                f"out of memory at step {batch.step} on a single rollout of {longest} tokens ({cause}); use "
                "model.gradient_checkpointing: true, fewer rollouts.max_new_tokens or teacher.max_prompt_tokens, or a "
                "smaller rollouts.vllm.memory_fraction."
            )
        self.layout = replace(self.layout, max_tokens=max(tokens // 2, longest))
        log.error(  # it may be this rank's alone, and other ranks than the first are silent below that
            "step %d: out of memory; from here on, rollouts.micro_batch_tokens is %d instead of %d.",
            *(batch.step, self.layout.max_tokens, tokens),
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, totals: Mapping[str, float]) -> float:
        """Clip the gradient and step; return the gradient's norm before clipping.

        A step whose losses or gradient are not finite is skipped, and its rollouts are kept in a trace. Such a step
        counts but changes no weights, as do the steps of a frozen policy: without gradients, AdamW does nothing.
        """
        with _Timer(self, "time/optimizer_s"):
            trainable = [p for group in optimizer.param_groups for p in group["params"]]
            with self._naming_lost_ranks():
                norm = clip_gradients(trainable, self.optimizer_config.max_grad_norm).item()
            checked = {name: value for name, value in totals.items() if name.startswith("loss/")}
            infinite = [name for name, value in (checked | {"gradient norm": norm}).items() if not math.isfinite(value)]
            if infinite or not self.objective.update_policy:
                optimizer.zero_grad()
            optimizer.step()
            cast(Any, self.lr_schedulers()).step()
        self.num_skipped = self.num_skipped + 1 if infinite else 0
        if infinite:
            self._keep_trace(batch)
            log.warning("step %d is skipped, because not finite: %s", batch.step, ", ".join(infinite))
        elif self.objective.update_policy:
            self.policy_version += 1
            if batch.is_last:
                self.policy.after_rollout_batch()
        return norm

    def _keep_trace(self, batch: Batch) -> None:
        """Make a trace of this step, whether or not one was due."""
        self.trace = StepTrace(batch)
        torch.manual_seed(derive_seed(self.seed, "dropout", batch.step))
        with torch.no_grad():
            for micro_batch in batch.micro_batches(self.layout, self.device):
                terms = self._score(micro_batch)
                if micro_batch.examples:
                    self.trace.add(micro_batch, terms)

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
