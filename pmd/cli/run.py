"""`fit`, `validate` and `test`: build the run, fit it, evaluate it, report.

`build` makes every object of a run, and `callbacks_of` sets the order in which the callbacks act at an epoch's end.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from transformers import PreTrainedModel

from pmd.atomic import replace_text
from pmd.callbacks.checkpoint import CheckpointCallback, restore_best
from pmd.callbacks.completions import CompletionsCallback, EvaluationTables
from pmd.callbacks.health import HealthCallback
from pmd.callbacks.memory import Auditor, MemoryCallback
from pmd.callbacks.ranks import RanksCallback
from pmd.callbacks.reflection import ReflectionCallback
from pmd.callbacks.sync import WeightSyncCallback
from pmd.callbacks.trace import TraceCallback
from pmd.callbacks.verification import StepVerificationCallback, VerificationCallback
from pmd.callbacks.wording import WordingCallback
from pmd.checkpoint_file import read_checkpoint
from pmd.cli.interrupt import OwnSigterm, describe, explaining_failures, interrupt_on_sigterm
from pmd.cli.preflight import check_run
from pmd.cli.printable import printable
from pmd.cli.ranks import joined
from pmd.cli.trainer import TrainerCLI, device_of
from pmd.config.load import LoadedConfig
from pmd.config.resume import check_changes, check_end, check_same_model, find_changes
from pmd.config.save import saved_values, saved_yaml
from pmd.config.schema import RunConfig, WandbConfig
from pmd.engines.base import Engine
from pmd.engines.hf import HFEngine
from pmd.engines.make import GpuShare, make_engine, start_vllm
from pmd.engines.parity import ParityCheck
from pmd.engines.shared import IdleEngine, LeadingEngine, LeadingScorer, follow
from pmd.engines.vllm_runtime import VLLMRuntime
from pmd.errors import CheckpointError, ConfigError, RunFailed
from pmd.evaluation.evaluate import Evaluator, Keep, evaluation_facts
from pmd.evaluation.metrics import Sample, score_samples
from pmd.evaluation.report import (
    ELSEWHERE,
    Phase,
    draw_curves,
    draw_pass_at,
    print_table,
    prompt_label,
    results_of,
    sum_costs,
    write_results,
)
from pmd.memory import EpochRecord, ProceduralMemory
from pmd.memory.behaviour_writer import BehaviourWriter
from pmd.memory.held_out import HeldOut
from pmd.memory.reflect import Reflector
from pmd.memory.shared import Figures, SharedMemory, SharedUpdater
from pmd.memory.stream import MemoryUpdater
from pmd.metrics_log import MetricsLog
from pmd.module import PMDModule
from pmd.planning.choose_memory import choose_here
from pmd.planning.engine_memory import share_gpu
from pmd.planning.estimate import estimate_run
from pmd.planning.gpu_memory import UNDIVIDED, Shards
from pmd.ranks import Ranks, is_lost
from pmd.rollouts.datamodule import RolloutDataModule, digest_of
from pmd.run_dir import RunDir, choose_run_dir, find_run_dir, fit_run_dir
from pmd.run_lock import locked
from pmd.scoring import PolicyScorer, output_head
from pmd.tasks import duplicated_task_ids, validates_on_test
from pmd.types import Rollout, Split, Task

CONSOLE = Console(stderr=False)


@dataclass
class Run:
    """All the objects of a run."""

    config: RunConfig
    run_dir: RunDir
    tasks: Mapping[Split, list[Task]]
    module: PMDModule
    data: RolloutDataModule
    memory: ProceduralMemory | None  # of several ranks, only the first has one; `data.memory` answers on all
    record: EpochRecord
    reflector: Reflector
    evaluator: Evaluator
    parity: ParityCheck | None
    ranks: Ranks | None = None  # of a run on several devices
    meet: Callable[[Figures], Figures] | None = None  # where they come together after rank 0 has updated the memory

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.ranks is None or self.ranks.is_first


@dataclass(frozen=True, slots=True)
class _Resumed:
    """The checkpoint from which a run goes on, and what it holds."""

    path: Path
    state: dict[str, Any]


def run(command: str, loaded: LoadedConfig, store: Path | None = None) -> int:
    """Run `fit`, `validate` or `test`, the last with the memory in `store`, if any; return the exit code."""
    interrupt_on_sigterm()
    if loaded.run.cpu_threads is not None:
        torch.set_num_threads(loaded.run.cpu_threads)
    torch.set_float32_matmul_precision("highest")  # what is float32 is meant to be: no TF32, whatever was set before
    return _fit_command(loaded) if command == "fit" else _evaluate_command(command, loaded, store)


def _fit_command(loaded: LoadedConfig) -> int:
    """Build the run, fit it, evaluate the first, the last and the best policy, report."""
    cli = TrainerCLI(loaded.trainer)
    with joined(loaded.trainer) as ranks, _claimed(loaded, ranks) as run_dir:
        resumed = _open_checkpoint(loaded, run_dir)
        with explaining_failures(run_dir, resumable=False):
            digest = None if resumed is None else resumed.state["RolloutDataModule"]["tasks"]
            run = build(loaded.run, run_dir, digest, ranks)
        with closing(run.data.engine):
            if resumed is not None:
                run.module.check_checkpoint(resumed.state)
            with explaining_failures(run_dir):
                trainer, checkpoints = _prepare_to_fit(run, loaded, cli, resumed)
                run.module.to(trainer.strategy.root_device)  # `fit` would move it, after the first evaluation
                initial = evaluate(run, "initial", with_memory=False)  # the untrained policy, even in a resumed run
                trained = fit(run, trainer, None if resumed is None else resumed.path)
                later, problems = evaluate_checkpoints(run, checkpoints)
                if run.is_first:
                    report(run, initial | later, trained, problems)
                else:
                    _tell_own(problems, run.run_dir)
    return 0


def _prepare_to_fit(
    run: Run, loaded: LoadedConfig, cli: TrainerCLI, resumed: _Resumed | None
) -> tuple[Trainer, CheckpointCallback]:
    """Write the configuration, begin or continue the log, and return the trainer and its checkpoints."""
    run_dir, step = run.run_dir, None
    if resumed is not None:
        run.data.load_state_dict(resumed.state["RolloutDataModule"])
        step = run.data.position.step
        if run.is_first:
            restore_best(run_dir, resumed.path, resumed.state)
        resumed.state.clear()  # its tensors would keep the file on the disk when the next one replaces it
    if run.is_first:
        replace_text(run_dir.config, saved_yaml(loaded))
    checkpoints = CheckpointCallback(run_dir, saved_values(loaded), loaded.run.checkpoint_every_steps)
    is_behind = resumed is not None and resumed.path != run_dir.last and _step_of(run_dir.last) > run.data.position.step
    loggers: list[Logger] = [DummyLogger()]
    if run.is_first:
        loggers = [MetricsLog(run_dir, step, keep_later=is_behind)]
        if loaded.run.wandb.mode != "off":
            loggers.append(_wandb_logger(loaded.run.wandb, run_dir))
    trainer = cli.trainer_for([*callbacks_of(run), checkpoints], loggers, run_dir.root, run.ranks)
    for logger in trainer.loggers:
        logger.log_hyperparams(saved_values(loaded))
    run.module.num_steps = run.data.num_steps(trainer.max_epochs or 0, trainer.max_steps)
    _announce(run, trainer)
    return trainer, checkpoints


def _wandb_logger(config: WandbConfig, run_dir: RunDir) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(
        name=run_dir.root.name,
        project=config.project,
        entity=config.entity,
        group=config.group,
        tags=config.tags,
        save_dir=run_dir.root,
        offline=config.mode == "offline",
    )


def _step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint; -1 if there is none that can be read."""
    try:
        return read_checkpoint(checkpoint)["RolloutDataModule"]["step"]
    except CheckpointError:
        return -1


@contextmanager
def _claimed(loaded: LoadedConfig, ranks: Ranks | None) -> Iterator[RunDir]:
    """Choose the directory that `fit` writes to, keep other runs out of it, and check that it can be written.

    Of several ranks, the first does so for all.
    """
    with ExitStack() as stack:
        if ranks is None:
            yield stack.enter_context(_claimed_here(loaded))
        else:
            yield ranks.from_first(lambda: stack.enter_context(_claimed_here(loaded)))


@contextmanager
def _claimed_here(loaded: LoadedConfig) -> Iterator[RunDir]:
    config = loaded.run
    with ExitStack() as stack:
        while True:
            run_dir = fit_run_dir(config, loaded.folder, loaded.name)
            try:
                stack.enter_context(locked(run_dir.root))
                if config.ckpt_path is None:  # another run may have begun here since the last look
                    choose_run_dir(str(run_dir.root), loaded.name, resume=False)
                break
            except ConfigError:
                if config.run_dir is not None or config.ckpt_path is not None or not run_dir.root.exists():
                    raise  # else the name was taken just now, and the next one is free
        run_dir.check_writable()
        yield run_dir


def _open_checkpoint(loaded: LoadedConfig, run_dir: RunDir) -> _Resumed | None:
    """Read the checkpoint to resume from, refuse settings that may not change, and print those that do.

    Raises:
        CheckpointError: it is damaged or foreign.
        ConfigError: settings differ that may not.
    """
    if loaded.run.ckpt_path is None:
        return None
    path = run_dir.checkpoint(loaded.run.ckpt_path)
    state = read_checkpoint(path)
    changes = find_changes(state["pmd"]["config"], saved_values(loaded))
    check_changes(changes)
    position = state["RolloutDataModule"]
    check_end(loaded.trainer, position["epoch"], position["step"])
    if position["num_begun"] or position["owed"]:
        where = f"within epoch {position['epoch']}"
    else:
        where = f"after {position['epoch']} epoch(s)"
    CONSOLE.print(f"Resumed from {path}, {where}, at step {position['step']}.", markup=False, soft_wrap=True)
    if changes:
        CONSOLE.print(f"Changed from here on: {', '.join(map(str, changes))}.", markup=False, soft_wrap=True)
    return _Resumed(path, state)


def _evaluate_command(command: str, loaded: LoadedConfig, store: Path | None) -> int:
    """Evaluate a checkpoint, or the untrained policy; write RUN/COMMAND-CHECKPOINT/, or with memory ...-memory-kK/."""
    config = loaded.run
    config.memory.enabled = False
    run_dir = find_run_dir(config, loaded.folder, loaded.name)
    checkpoint = run_dir.checkpoint(config.ckpt_path) if config.ckpt_path else None
    with locked(run_dir.root):
        shown = "" if store is None else f"-memory-k{config.memory.k}"
        out = RunDir(run_dir.root / f"{command}-{checkpoint.stem if checkpoint else 'initial'}{shown}")
        out.check_writable()
        state = None if checkpoint is None else read_checkpoint(checkpoint)
        if state is not None:
            check_same_model(find_changes(state["pmd"]["config"], saved_values(loaded)))
        with explaining_failures(run_dir, resumable=False), ExitStack() as stack:
            run = build(config, run_dir)
            stack.enter_context(closing(run.data.engine))
            run.module.to(device_of(loaded.trainer))
            if state is not None:
                _load_policy(run, state)
            _evaluate_split(run, command, checkpoint, out, store)
    return 0


def _evaluate_split(run: Run, command: str, checkpoint: Path | None, out: RunDir, store: Path | None) -> None:
    """Evaluate the loaded policy on the validation or test tasks; write what came out, which names the memory."""
    config = run.config
    split: Split = "validation" if command == "validate" else "test"
    tasks, name = run.tasks[split], checkpoint.stem if checkpoint else "initial"
    method = config.method if store is None else f"{config.method} with memory, k={config.memory.k}"
    facts = {"method": method, "seed": config.seed_everything, "split": split, "checkpoint": str(checkpoint)}
    tables, rollouts = _tables(run, out), list[Rollout]()
    keep = None if tables is None else rollouts.append
    if store is None:
        samples = run.evaluator.memory_free(tasks, config.verification.final_samples, keep)
    else:
        facts["memory"] = {"store": str(store), "k": config.memory.k}
        samples = _sample_with(run, tasks, store, keep)
    if tables is not None:
        tables.write(f"{split}-{name}", {store is not None: rollouts}, run.module.policy_version)
    facts |= evaluation_facts(config, tasks)
    phases = phases_of(run, name, samples)
    results = results_of(facts, phases)
    print_table(results, results["chance"], CONSOLE)
    out.root.mkdir(parents=True, exist_ok=True)
    title = f"{config.method}, seed {config.seed_everything}, {split} tasks, {name}, {prompt_label(results)}"
    draw_pass_at(out.pass_at_k, {name: samples}, tasks, title)
    write_results(out, results, phases)
    CONSOLE.print(f"results.json, samples.jsonl and pass_at_k.png are in {out.root}", markup=False, soft_wrap=True)


def _sample_with(run: Run, tasks: Sequence[Task], store: Path, keep: Keep | None) -> list[Sample]:
    """Sample the policy with a memory in its prompt that another run built."""
    from pmd.memory.reading import opened_memory

    config, train = run.config, run.tasks["train"]
    held_out, keys = HeldOut({"train": train, "test": tasks}), [task.lookup_key for task in train]
    with opened_memory(store, config.memory, keys, held_out) as memory:
        return run.evaluator.memory_conditioned(tasks, config.verification.final_samples, memory, keep)


def build(config: RunConfig, run_dir: RunDir, tasks_digest: str | None = None, ranks: Ranks | None = None) -> Run:
    """Load the tasks, open the memory, load the weights, start the engine.

    Args:
        tasks_digest: of the tasks with which a resumed run began.
        ranks: of a run on several devices; the first opens the memory for all.

    Raises:
        ConfigError: something cannot be used, or the tasks are others.
    """
    ready = check_run(config)
    config, tasks, prompts = ready.config, ready.tasks, ready.prompts
    if tasks_digest not in (None, digest_of(tasks)):
        raise ConfigError(
            f"data.path={config.data.path}: the training or validation tasks are not those that this run began with, "
            "so its position and its memory mean nothing for them; restore them, or start a new run."
        )
    shards = None if ranks is None or not ranks.shards else Shards(ranks.size, ranks.shard_dtype is not None)
    choice = partial(choose_here, config, shards or UNDIVIDED)  # by the memory that rank 0 has
    config, chosen = choice() if ranks is None else ranks.from_first(choice)
    for line in [*ready.notes, *([] if chosen is None else [chosen])]:
        CONSOLE.print(line, markup=False, soft_wrap=True)
    share = _share_gpu(config, shards) if config.rollouts.engine == "vllm" else None  # while all of it is free
    record, memory = EpochRecord(), _open_memory(config, tasks, run_dir, ranks)  # first: vLLM takes minutes to start
    runtime, base = (None, None) if share is None else _start_vllm(config, run_dir, shards, share)
    module = PMDModule(config, base)
    if ranks is not None:
        module.share_with(ranks)
    with module.policy.weights("student") as model:
        output_head(model)  # refuses an unusual one before anything is generated
    engine, meet = _make_engine(config, module, runtime, ranks), None
    leading = engine
    if ranks is not None:
        leading, meet = _meeting(engine, _scorer(module), ranks)
    train_tasks = {task.task_id: task for task in tasks["train"]}
    writer = BehaviourWriter(config.reflection, prompts) if config.reflection.behaviour_writer.base_url else None
    reflector = Reflector(leading, prompts, config.reflection, train_tasks, config.seed_everything, writer)
    readable, updater = memory, None
    if config.memory.update == "batch" and memory is not None:
        updater = MemoryUpdater(record, memory, reflector)
    if config.memory.enabled and ranks is not None and meet is not None:
        readable = SharedMemory(memory, ranks.from_first)
        updater = SharedUpdater(updater, meet) if config.memory.update == "batch" else None
    data = RolloutDataModule(config, tasks, engine, prompts, readable, updater, ranks)
    evaluator = Evaluator(
        engine,
        data.contexts,
        config.verification,
        config.verifiers,
        config.rollouts.max_new_tokens,
        config.seed_everything,
        ranks,
    )
    parity = None
    vllm = config.rollouts.vllm
    if not isinstance(engine, HFEngine) and vllm.parity_completions:  # engines with their own weights
        sampled = [prompts.student(task) for task in tasks["train"][: vllm.parity_completions]]
        parity = ParityCheck(engine, module.policy, sampled, vllm, module.layout.pad_id, ranks)
    return Run(config, run_dir, tasks, module, data, memory, record, reflector, evaluator, parity, ranks, meet)


def _make_engine(config: RunConfig, module: PMDModule, runtime: VLLMRuntime | None, ranks: Ranks | None) -> Engine:
    """Return this process's engine. Where servers generate, the first rank alone talks to them."""
    if ranks is not None and config.rollouts.engine == "vllm_server":
        ranks.num_generating = 1
        if not ranks.is_first:
            return IdleEngine()
    return make_engine(config, module.policy, module.tokenizer, runtime)


def _meeting(engine: Engine, scorer: PolicyScorer, ranks: Ranks) -> tuple[Engine, Callable[[Figures], Figures]]:
    """Return the engine that rank 0 reflects with, and how the ranks come together after that."""
    if not ranks.is_first:
        return engine, lambda _: follow(engine, scorer, ranks)
    leading = LeadingEngine(engine, ranks)
    return cast(Engine, leading), leading.release


def _scorer(module: PMDModule) -> PolicyScorer:
    return PolicyScorer(module.policy, module.layout.pad_id, module.layout.max_tokens)


def _open_memory(
    config: RunConfig, tasks: Mapping[Split, list[Task]], run_dir: RunDir, ranks: Ranks | None
) -> ProceduralMemory | None:
    """Open the run's memory; of several ranks, the first does."""
    if not config.memory.enabled or not (ranks is None or ranks.is_first):
        return None
    keys = [task.lookup_key for task in tasks["train"]]
    return ProceduralMemory(run_dir.memory, config.memory, keys, duplicated_task_ids(tasks), HeldOut(tasks))


def _share_gpu(config: RunConfig, shards: Shards | None) -> GpuShare:
    """Divide the GPU between trainer and vLLM, and print how. An embedder is counted, so it must not be there yet."""
    share, lines = share_gpu(config, shards)
    for line in lines:
        CONSOLE.print(line, markup=False, soft_wrap=True)
    return share


def _start_vllm(
    config: RunConfig, run_dir: RunDir, shards: Shards | None, share: GpuShare
) -> tuple[VLLMRuntime, PreTrainedModel]:
    """Start vLLM with its share of the GPU; return the trainer's base as well."""
    return start_vllm(config, share, run_dir.cache, (shards or UNDIVIDED).computed(config).model.dtype)


def callbacks_of(run: Run) -> list[Callback]:
    """Return the callbacks in the order in which they act: verify, reflect, update memory, sync, trace, look."""
    config, engine = run.config, run.data.engine
    verification = VerificationCallback(
        run.evaluator, run.tasks["validation"], run.data.memory, _tables(run, run.run_dir)
    )
    callbacks: list[Callback] = [] if run.ranks is None else [OwnSigterm()]  # first: an evaluation may take hours
    callbacks.append(verification)
    if run.memory is not None:
        callbacks.append(ReflectionCallback(run.record, run.memory, run.reflector))
        auditor = None
        if config.memory.audit_groups:
            scorer, parity = _scorer(run.module), run.parity
            if run.ranks is not None:
                scorer = LeadingScorer(scorer, run.ranks) if run.ranks.shards else scorer
                parity = None  # all ranks measure it together, in RanksCallback
            auditor = Auditor(engine, scorer, config.teacher.max_prompt_tokens, parity)
        callbacks.append(MemoryCallback(run.record, run.memory, run.reflector, run.run_dir.items, auditor))
    if run.meet is not None and run.data.memory is not None:
        slept = config.memory.audit_groups and config.rollouts.engine == "vllm"
        callbacks.append(RanksCallback(run.meet, run.parity if slept else None))
    callbacks.append(WeightSyncCallback(engine, run.parity))
    if config.verification.every_steps is not None:
        callbacks.append(StepVerificationCallback(verification, config.verification.every_steps))
    callbacks.append(WordingCallback())
    callbacks.append(TraceCallback(run.run_dir.traces, config.trace_every))
    callbacks.append(CompletionsCallback(run.run_dir.completions))
    callbacks.append(HealthCallback(run.run_dir.root, stop_on_collapse=config.stop_on_collapse))
    return callbacks


def _tables(run: Run, run_dir: RunDir) -> EvaluationTables | None:
    """Return what writes the tables of evaluations; nothing does if the run keeps no traces."""
    if not run.config.trace_every or not run.is_first:
        return None
    return EvaluationTables(run_dir.completions, run.module.tokenizer)


def fit(run: Run, trainer: Trainer, checkpoint: Path | None) -> dict[str, Any]:
    """Train from a checkpoint or from the start; return the run's rollouts and updates, the seconds it took now, and
    the kind of its device."""
    started = time.perf_counter()
    trainer.fit(run.module, run.data, ckpt_path=checkpoint, weights_only=True)
    seconds = time.perf_counter() - started
    for logger in trainer.loggers:
        logger.finalize("success")
    counts = {"rollouts": run.data.position.num_rollouts, "updates": run.module.policy_version}
    return counts | {"fit_s": seconds, "device": trainer.strategy.root_device.type}


def evaluate(run: Run, name: str, *, with_memory: bool) -> dict[str, Phase]:
    """Evaluate the policy, as it is now, on the test tasks; return one phase, or two (see `phases_of`)."""
    verification, shown = run.config.verification, list[Sample]()
    tables, rollouts = _tables(run, run.run_dir), {False: list[Rollout](), True: list[Rollout]()}
    keep = {shows: own.append if tables is not None else None for shows, own in rollouts.items()}
    samples = run.evaluator.memory_free(run.tasks["test"], verification.final_samples, keep[False])
    if with_memory and run.data.memory is not None:
        shown = run.evaluator.memory_conditioned(run.tasks["test"], verification.samples, run.data.memory, keep[True])
    if tables is not None:
        tables.write(f"test-{name}", rollouts, run.module.policy_version)
    return phases_of(run, name, samples, shown)


def phases_of(run: Run, name: str, samples: Sequence[Sample], shown: Sequence[Sample] = ()) -> dict[str, Phase]:
    """Score samples on the trained domains and, apart from them, on the other domains of `data.test_domains`.

    Args:
        shown: samples with memory in the prompt.
    """
    trained = {task.domain for task in run.tasks["train"]}
    is_elsewhere = any(sample.domain in trained for sample in samples)  # else there is nothing to keep apart
    phases: dict[str, Phase] = {}
    for suffix, elsewhere in (("", False), (ELSEWHERE, True)):
        own, conditioned = (
            [s for s in part if (is_elsewhere and s.domain not in trained) == elsewhere] for part in (samples, shown)
        )
        if own:
            avg = score_samples(conditioned, (1,)).avg if conditioned else None
            phases[name + suffix] = Phase(own, score_samples(own, run.config.verification.pass_at), avg)
    return phases


def evaluate_checkpoints(run: Run, checkpoints: CheckpointCallback) -> tuple[dict[str, Phase], list[Exception]]:
    """Evaluate the last policy and the one that was best in validation, which stays loaded.

    Returns the evaluations that succeeded, and the errors of those that did not: training is over, and what it gave is
    reported in any case.
    """
    phases: dict[str, Phase] = {}
    try:
        if run.data.engine.policy_version != run.module.policy_version:  # a finished run, resumed: no step has synced
            _sync_engine(run)
        phases = evaluate(run, "last", with_memory=run.config.verification.memory_conditioned)
        if checkpoints.best_step in (None, run.data.position.step):  # None: it ended before its first step
            return phases | {name.replace("last", "best", 1): phase for name, phase in phases.items()}, []
        state = read_checkpoint(run.run_dir.best)
        step = state["RolloutDataModule"]["step"]
        if step != checkpoints.best_step:
            raise CheckpointError(
                f"checkpoint={run.run_dir.best} is of step {step}, and the best one was of step "
                f"{checkpoints.best_step}; it is not reported."
            )
        _load_policy(run, state)
        phases |= evaluate(run, "best", with_memory=False)
    except Exception as error:
        return phases, [error]
    return phases, []


def report(
    run: Run, phases: Mapping[str, Phase], trained: Mapping[str, Any], problems: Sequence[Exception] = ()
) -> None:
    """Print the table, and write curves.png, samples.jsonl and results.json, each if the others fail too.

    Raises:
        PmdError: something could not be evaluated or written; the rest was.
    """
    config, run_dir, problems = run.config, run.run_dir, list(problems)
    facts = {"method": config.method, "seed": config.seed_everything, **trained, "totals": sum_costs(run_dir)}
    facts["selected_on"] = "test" if validates_on_test(run.tasks) else "validation"
    if problems:
        facts["problems"] = [describe(error, run_dir) for error in problems]
    trained_on = {task.domain for task in run.tasks["train"]}
    tested = [task for task in run.tasks["test"] if task.domain in trained_on] or run.tasks["test"]
    results = results_of(facts | evaluation_facts(config, tested), phases)
    print_table(results, results["chance"], CONSOLE)
    for write in (
        lambda: draw_curves(run_dir, f"{config.method}, seed {config.seed_everything}"),
        lambda: write_results(run_dir, results, phases),
    ):
        try:
            write()
        except Exception as error:
            problems.append(error)
    files = "results.json, curves.png, metrics.csv, checkpoints/"
    CONSOLE.print(f"Everything of this run is in {run_dir.root}: {files}", markup=False)
    if problems:
        said = "; ".join(describe(error, run_dir).rstrip(".") for error in problems)
        raise RunFailed(f"training is complete, but not all of its results are: {said}. What is there was reported.")


def _tell_own(problems: Sequence[Exception], run_dir: RunDir) -> None:
    """Print what this rank could not evaluate, unless only because of another one: the first rank, which fails because
    of it and reports what there is, does not know the reason."""
    for problem in problems:
        if not is_lost(problem):
            print(printable(describe(problem, run_dir)), file=sys.stderr)


def _load_policy(run: Run, state: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights into the policy and the engine."""
    state = dict(state)
    run.module.on_load_checkpoint(state)
    run.module.load_state_dict(state["state_dict"], strict=False)
    _sync_engine(run)


def _sync_engine(run: Run) -> None:
    """Copy weights that were loaded from a checkpoint to the engine, and check parity."""
    run.data.engine.sync(run.module.policy_version)
    if run.parity is not None:
        run.parity.measure(nullcontext())


def _announce(run: Run, trainer: Trainer) -> None:
    """Print how many rollouts and updates the run will make, and what that will cost."""
    rollouts, steps = run.config.rollouts, run.data.steps_per_epoch
    epochs = trainer.max_epochs or 0
    left = run.data.num_steps(trainer.max_epochs or 0, trainer.max_steps) - run.data.position.step
    if left <= 0:
        CONSOLE.print(
            f"Nothing is left to train: the run has done its {run.data.position.step} updates and is evaluated again. "
            f"A larger trainer.max_epochs continues it. Run directory: {run.run_dir.root}",
            markup=False,
            soft_wrap=True,
        )
        return
    estimate = estimate_run(run.config, run.run_dir, left)
    CONSOLE.print(
        f"{run.config.method}: {rollouts.tasks_per_step} tasks x {rollouts.group_size} attempts = "
        f"{rollouts.tasks_per_step * rollouts.group_size} rollouts a batch, {rollouts.updates_per_batch} update(s) "
        f"each; {steps} steps x {epochs} epochs = {steps * epochs} updates. Run directory: {run.run_dir.root}",
        markup=False,
    )
    CONSOLE.print(estimate, markup=False, soft_wrap=True)
