"""`fit`, `validate` and `test`: build the run, fit it, evaluate it, report.

`build` makes every object of a run, and `callbacks_of` sets the order in which the callbacks act at an epoch's end.
"""

import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from rich.console import Console

from pmd.callbacks.checkpoint import MovableCheckpoint
from pmd.callbacks.health import HealthCallback
from pmd.callbacks.memory import Auditor, MemoryCallback
from pmd.callbacks.reflection import ReflectionCallback
from pmd.callbacks.sync import WeightSyncCallback
from pmd.callbacks.trace import TraceCallback
from pmd.callbacks.verification import VerificationCallback
from pmd.cli.interrupt import interrupt_on_sigterm, saying_how_to_resume
from pmd.cli.trainer import TrainerCLI
from pmd.config.check import describe_rounding
from pmd.config.load import LoadedConfig
from pmd.config.save import saved_yaml
from pmd.config.schema import RunConfig
from pmd.engines.make import check_engine, make_engine
from pmd.engines.parity import ParityCheck
from pmd.evaluation.evaluate import Evaluator, evaluation_facts
from pmd.evaluation.metrics import score_samples
from pmd.evaluation.report import Phase, draw_curves, draw_pass_at, print_table, sum_costs, write_results
from pmd.memory import EpochRecord, ProceduralMemory
from pmd.model_check import check_model, fit_to_positions, max_positions
from pmd.module import PMDModule
from pmd.planning.engine_memory import plan_here
from pmd.pretrained import describe_noise, load_model_config, load_tokenizer
from pmd.rollouts.datamodule import RolloutDataModule, refuse_long_prompts
from pmd.run_dir import RunDir, find_run_dir, fit_run_dir
from pmd.scoring import PolicyScorer, output_head
from pmd.tasks import duplicated_task_ids, find_duplicates, load_tasks
from pmd.tasks.prompts import PromptFormat, make_prompts
from pmd.types import Split, Task
from pmd.verifiers.resolve import prepare_verifiers

CONSOLE = Console(stderr=False)


@dataclass
class Run:
    """All the objects of a run."""

    config: RunConfig
    run_dir: RunDir
    tasks: Mapping[Split, list[Task]]
    module: PMDModule
    data: RolloutDataModule
    memory: ProceduralMemory | None
    evaluator: Evaluator
    parity: ParityCheck | None


def run(command: str, loaded: LoadedConfig) -> int:
    """Run `fit`, `validate` or `test`; return the exit code."""
    interrupt_on_sigterm()
    if loaded.run.cpu_threads is not None:
        torch.set_num_threads(loaded.run.cpu_threads)
    return _fit_command(loaded) if command == "fit" else _evaluate_command(command, loaded)


def _fit_command(loaded: LoadedConfig) -> int:
    """Build the run, fit it, evaluate the first, the last and the best policy, report."""
    config = loaded.run
    run_dir = fit_run_dir(config, loaded.folder, loaded.name)
    checkpoint = run_dir.checkpoint(config.ckpt_path) if config.ckpt_path else None
    cli = TrainerCLI(loaded.trainer)
    run = build(config, run_dir)
    with closing(run.data.engine):
        if checkpoint is not None:
            run.module.check_checkpoint(read_checkpoint(checkpoint))
        run_dir.root.mkdir(parents=True, exist_ok=True)
        run_dir.config.write_text(saved_yaml(loaded), encoding="utf-8")
        trainer = cli.trainer_for(callbacks_of(run), _loggers(config, run_dir, checkpoint))
        _announce(run, trainer)
        initial = evaluate(run, with_memory=False)  # the untrained policy, even in a resumed run
        with saying_how_to_resume(run_dir):
            trained = fit(run, trainer, checkpoint)
            phases = {"initial": initial} | evaluate_checkpoints(run, trainer)
        report(run, phases, trained)
    return 0


def _evaluate_command(command: str, loaded: LoadedConfig) -> int:
    """Evaluate a checkpoint, or the untrained policy, without opening any memory; write RUN/COMMAND-CHECKPOINT/."""
    config = loaded.run
    config.memory.enabled = False
    run_dir = find_run_dir(config, loaded.folder, loaded.name)
    checkpoint = run_dir.checkpoint(config.ckpt_path) if config.ckpt_path else None
    run = build(config, run_dir)
    split: Split = "validation" if command == "validate" else "test"
    tasks, name = run.tasks[split], checkpoint.stem if checkpoint else "initial"
    with closing(run.data.engine):
        if checkpoint is not None:
            _load_policy(run, read_checkpoint(checkpoint))
        samples = run.evaluator.memory_free(tasks, config.verification.final_samples)
    out = RunDir(run_dir.root / f"{command}-{name}")
    out.root.mkdir(parents=True, exist_ok=True)
    facts = {"method": config.method, "seed": config.seed_everything, "split": split, "checkpoint": str(checkpoint)}
    facts |= evaluation_facts(config, tasks)
    results = write_results(out, facts, {name: Phase(samples, score_samples(samples, config.verification.pass_at))})
    title = f"{config.method}, seed {config.seed_everything}, {split} tasks, {name}"
    draw_pass_at(out.pass_at_k, {name: samples}, tasks, title)
    print_table(results | {"method": f"{config.method}, {split}"}, results["chance"], CONSOLE)
    CONSOLE.print(f"results.json, samples.jsonl and pass_at_k.png are in {out.root}", markup=False, soft_wrap=True)
    return 0


def build(config: RunConfig, run_dir: RunDir) -> Run:
    """Load the tasks and the weights, start the engine, open the memory."""
    check_engine(config)
    tasks = load_tasks(config.data, config.seed_everything)
    _prepare(tasks, config)
    config, prompts = _prepare_model(config, tasks)
    plan = plan_here(config) if config.rollouts.engine == "vllm" else None
    if plan is not None:
        CONSOLE.print(str(plan), markup=False, soft_wrap=True)
    module = PMDModule(config)
    with module.policy.weights("student") as model:
        output_head(model)  # refuses an unusual one before anything is generated
    engine = make_engine(config, module.policy, module.tokenizer, None if plan is None else plan.fraction)
    memory = None
    if config.memory.enabled:
        keys = [task.memory_key or task.question for task in tasks["train"]]
        memory = ProceduralMemory(run_dir.memory, config.memory, keys, duplicated_task_ids(tasks))
    data = RolloutDataModule(config, tasks, engine, prompts, memory)
    evaluator = Evaluator(
        engine,
        data.contexts,
        config.verification,
        config.verifiers,
        config.rollouts.max_new_tokens,
        config.seed_everything,
    )
    parity = None
    vllm = config.rollouts.vllm
    if config.rollouts.engine in ("vllm", "vllm_server") and vllm.parity_completions:  # engines with their own weights
        sampled = [prompts.student(task) for task in tasks["train"][: vllm.parity_completions]]
        parity = ParityCheck(engine, module.policy, sampled, vllm, module.layout.pad_id)
    return Run(config, run_dir, tasks, module, data, memory, evaluator, parity)


def _prepare(tasks: Mapping[Split, list[Task]], config: RunConfig) -> None:
    """Refuse verifiers that cannot be used; print notes on rounding, the sandbox and duplicates among the splits."""
    everything = [task for part in tasks.values() for task in part]
    for line in [*describe_rounding(config), *prepare_verifiers(everything, config.verifiers.sandbox)]:
        CONSOLE.print(line, markup=False, soft_wrap=True)
    duplicates = find_duplicates(everything)
    if duplicates.same_prompt or duplicates.same_stem:
        CONSOLE.print(str(duplicates), markup=False, soft_wrap=True)


def _prepare_model(config: RunConfig, tasks: Mapping[Split, list[Task]]) -> tuple[RunConfig, PromptFormat]:
    """Refuse a model or tokenizer that cannot serve the tasks; return the limits that it can hold, and the prompts."""
    architecture, tokenizer = load_model_config(config.model), load_tokenizer(config.model)
    check_model(config, architecture, tokenizer, [task for part in tasks.values() for task in part])
    prompts = make_prompts(config.model.prompts, tokenizer)
    longest = refuse_long_prompts(tasks, prompts, config.rollouts.max_prompt_tokens)
    config, lines = fit_to_positions(config, max_positions(architecture), longest)
    for line in [*lines, *describe_noise(architecture)]:
        CONSOLE.print(line, markup=False, soft_wrap=True)
    return config, prompts


def callbacks_of(run: Run) -> list[Callback]:
    """Return the callbacks in the order in which they act: verify, reflect, update memory, sync, trace, look, save."""
    config, engine, prompts = run.config, run.data.engine, run.data.prompts
    callbacks: list[Callback] = [VerificationCallback(run.evaluator, run.tasks["validation"], run.memory)]
    if run.memory is not None:
        record, seed = EpochRecord(), config.seed_everything
        tasks = {task.task_id: task for task in run.tasks["train"]}
        callbacks.append(ReflectionCallback(record, engine, prompts, tasks, config.reflection, run.memory, seed))
        auditor = None
        if config.memory.audit_groups:
            scorer = PolicyScorer(run.module.policy, run.module.layout.pad_id, config.rollouts.micro_batch_tokens)
            auditor = Auditor(engine, scorer, config.teacher.max_prompt_tokens, run.parity)
        callbacks.append(
            MemoryCallback(record, run.memory, engine, prompts, config.reflection, seed, run.run_dir.items, auditor)
        )
    callbacks.append(WeightSyncCallback(engine, config.rollouts.updates_per_batch, run.parity))
    callbacks.append(TraceCallback(run.run_dir.traces, config.trace_every))
    callbacks.append(HealthCallback(run.run_dir.root, stop_on_collapse=config.stop_on_collapse))
    # Two, because ModelCheckpoint(save_last=True) writes `last` only in epochs in which it writes `best`.
    best = _checkpoint(run.run_dir, "best", monitor="verify/avg")
    return [*callbacks, best, _checkpoint(run.run_dir, "last", monitor=None)]


def _checkpoint(run_dir: RunDir, name: str, monitor: str | None) -> MovableCheckpoint:
    """Return the callback that writes NAME.ckpt after each epoch; with `monitor`, only if it is the best so far."""
    return MovableCheckpoint(
        dirpath=run_dir.checkpoints,
        filename=name,
        monitor=monitor,
        mode="max",
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def fit(run: Run, trainer: Trainer, checkpoint: Path | None) -> dict[str, float]:
    """Train from a checkpoint or from the start; return the run's rollouts and updates, and the seconds it took now."""
    started = time.perf_counter()
    trainer.fit(run.module, run.data, ckpt_path=checkpoint, weights_only=False)
    seconds = time.perf_counter() - started
    for logger in trainer.loggers:
        logger.finalize("success")
    rollouts = trainer.current_epoch * len(run.tasks["train"]) * run.config.rollouts.group_size
    return {"rollouts": rollouts, "updates": run.module.policy_version, "fit_s": seconds}


def evaluate(run: Run, *, with_memory: bool) -> Phase:
    """Evaluate the policy, as it is now, on the test tasks."""
    verification = run.config.verification
    samples = run.evaluator.memory_free(run.tasks["test"], verification.final_samples)
    conditioned = None
    if with_memory and run.memory is not None:
        shown = run.evaluator.memory_conditioned(run.tasks["test"], verification.samples, run.memory)
        conditioned = score_samples(shown, (1,)).avg
    return Phase(samples, score_samples(samples, verification.pass_at), conditioned)


def evaluate_checkpoints(run: Run, trainer: Trainer) -> dict[str, Phase]:
    """Evaluate the last policy and the one that was best in validation; the best one stays loaded."""
    if run.data.engine.policy_version != run.module.policy_version:  # a finished run, resumed: no step has synced
        _sync_engine(run)
    last = evaluate(run, with_memory=run.config.verification.memory_conditioned)
    state = read_checkpoint(run.run_dir.checkpoints / "best.ckpt")
    if state["global_step"] == trainer.global_step:
        return {"last": last, "best": last}
    _load_policy(run, state)
    return {"last": last, "best": evaluate(run, with_memory=False)}


def report(run: Run, phases: Mapping[str, Phase], trained: Mapping[str, float]) -> None:
    """Write results.json, samples.jsonl and curves.png; print the table."""
    config, run_dir = run.config, run.run_dir
    facts = {"method": config.method, "seed": config.seed_everything, **trained, "totals": sum_costs(run_dir)}
    results = write_results(run_dir, facts | evaluation_facts(config, run.tasks["test"]), phases)
    draw_curves(run_dir, f"{config.method}, seed {config.seed_everything}")
    print_table(results, results["chance"], CONSOLE)
    files = "results.json, curves.png, metrics.csv, checkpoints/"
    CONSOLE.print(f"Everything of this run is in {run_dir.root}: {files}", markup=False)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state that a checkpoint file holds, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _load_policy(run: Run, state: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights into the policy and the engine."""
    run.module.on_load_checkpoint(dict(state))
    run.module.load_state_dict(state["state_dict"], strict=False)
    _sync_engine(run)


def _sync_engine(run: Run) -> None:
    """Copy weights that were loaded from a checkpoint to the engine, and check parity."""
    run.data.engine.sync(run.module.policy_version)
    if run.parity is not None:
        run.parity.measure(nullcontext())


def _loggers(config: RunConfig, run_dir: RunDir, checkpoint: Path | None) -> list[Logger]:
    """Return the CSV logger, with the rows that a resumed run already has, and the wandb logger if enabled."""
    rows = run_dir.read_metrics() if checkpoint is not None else []
    csv_logger = CSVLogger(run_dir.root, name="", version="", flush_logs_every_n_steps=20)
    if checkpoint is not None:
        done = read_checkpoint(checkpoint)["global_step"]
        for row in rows:
            if float(row["step"]) < done:
                csv_logger.experiment.log_metrics({k: float(v) for k, v in row.items() if v}, int(float(row["step"])))
        csv_logger.save()  # the logger has deleted the file, and the first step is minutes away
    loggers: list[Logger] = [csv_logger]
    if config.wandb != "off":
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project="pmd", save_dir=run_dir.root, offline=config.wandb == "offline"))
    return loggers


def _announce(run: Run, trainer: Trainer) -> None:
    """Print how many rollouts and updates the run will make."""
    rollouts, steps = run.config.rollouts, run.data.steps_per_epoch
    epochs = trainer.max_epochs or 0
    CONSOLE.print(
        f"{run.config.method}: {rollouts.tasks_per_step} tasks x {rollouts.group_size} attempts = "
        f"{rollouts.tasks_per_step * rollouts.group_size} rollouts a batch, {rollouts.updates_per_batch} update(s) "
        f"each; {steps} steps x {epochs} epochs = {steps * epochs} updates. Run directory: {run.run_dir.root}",
        markup=False,
    )
