"""The model card of an export: what a stranger who finds the model wants to know, from the run's own files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pmd import __version__
from pmd.config.schema import RunConfig
from pmd.run_dir import GENERATED, RunDir

PAPER = "https://arxiv.org/abs/2607.01480"
TEMPLATE = """---
{front}---

# {name}

{base}, trained by [Procedural Memory Distillation]({paper}) with pmd (method `{method}`): {kind}.
It needs no memory in its prompt, and no code of pmd.

{load}
## Training

| | |
|---|---|
{facts}

## Scores

{scores}

## Memory

{memory}
"""
FULL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```
"""
ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)
```
"""


def model_card(run_dir: RunDir, config: RunConfig, checkpoint: Path, *, is_adapter: bool) -> str:
    """Return the README.md of an export, with a front matter that the Hugging Face Hub reads."""
    results = _read_json(run_dir.results)
    license_name = base_license(config.model.path)
    front = {
        "base_model": config.model.path,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"pmd", config.method}),
        **({"license": license_name} if license_name else {}),
    }
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=True),
        name=_plain(f"{Path(config.model.path).name}-{config.method}"),
        base=_plain(config.model.path),
        paper=PAPER,
        method=_plain(config.method),
        kind=_kind(config, is_adapter=is_adapter),
        load=ADAPTER if is_adapter else FULL,
        facts="\n".join(
            f"| {name} | {_plain(value)} |" for name, value in _facts(config, results, checkpoint, license_name)
        ),
        scores=_scores(results),
        memory=_memory(config),
    )


def base_license(path: str) -> str:
    """Return the licence that the card of a local base model names; empty if there is none."""
    try:
        text = (Path(path) / "README.md").read_text(encoding="utf-8", errors="replace")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, IndexError, yaml.YAMLError):
        return ""
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else ""


def _kind(config: RunConfig, *, is_adapter: bool) -> str:
    if config.model.finetune == "full":
        return "all weights were trained"
    rank = f"LoRA, rank {config.model.lora_rank}, alpha {config.model.lora_alpha:g}"
    quantized = " on a 4-bit base" if config.model.finetune == "qlora" else ""
    return f"an adapter ({rank}{quantized})" + ("" if is_adapter else ", merged into the base")


def _facts(
    config: RunConfig, results: Mapping[str, Any], checkpoint: Path, license_name: str
) -> Iterator[tuple[str, str]]:
    totals = results.get("totals") or {}
    domains = f" ({', '.join(config.data.domains)})" if config.data.task == "sciknoweval" else ""
    yield "tasks", f"{config.data.path or config.data.taskset.get('id') or config.data.task}{domains}"
    yield "checkpoint", checkpoint.name
    yield "seed", str(config.seed_everything)
    yield "learning rate", f"{config.optimizer.lr:g} ({config.optimizer.schedule})"
    yield "rollouts a batch", f"{config.rollouts.tasks_per_step} tasks x {config.rollouts.group_size}"
    for key, name in (("rollouts", "rollouts"), ("updates", "updates")):
        if key in results:
            yield name, f"{results[key]:,}"
    tokens = sum(totals.get(name, 0.0) for name in GENERATED)
    if tokens:
        yield "generated tokens, reflections included", f"{tokens:,.0f}"
    if results.get("fit_s"):
        yield "time of the last fit", f"{results['fit_s'] / 3600:.2f} h"
    yield "licence of the base", license_name or "not stated by the base's files; see its own card"
    yield "pmd", __version__


def _scores(results: Mapping[str, Any]) -> str:
    """Return a table of the evaluations, or that there is none."""
    phases = results.get("phases")
    if not isinstance(phases, dict) or not phases:
        return "The run was not evaluated to its end."
    rows = ["| policy | avg | ± s.e. | tasks x samples |", "|---|---:|---:|---:|"]
    for name, phase in phases.items():
        error = phase.get("avg_error")
        margin = "-" if error is None else f"{100 * error:.1f}"
        each = phase["num_samples"] // max(1, phase["num_tasks"])
        rows.append(f"| {_plain(name)} | {100 * phase['avg']:.1f} | {margin} | {phase['num_tasks']} x {each} |")
    return "Test tasks, percent solved, no memory in the prompt; errors are clustered by task.\n\n" + "\n".join(rows)


def _memory(config: RunConfig) -> str:
    if not config.memory.enabled:
        return "None was kept."
    start = (
        f"It began with an import of {_plain(Path(config.memory.import_path).name)}. "
        if config.memory.import_path
        else ""
    )
    return (
        f"{start}The teacher saw up to {config.memory.k} items for a task, all learned from this run's own verified "
        "rollouts on training tasks. Held-out tasks never enter memory. The memory is not part of this export."
    )


def _plain(text: str) -> str:
    """Return text that neither ends a table's cell nor is markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
