"""`python -m pmd init`: writes a commented configuration for a model, a task file and a GPU."""

import shlex
from pathlib import Path

from pmd.atomic import replace_text
from pmd.cli.arguments import make_parser
from pmd.errors import ConfigError

DESCRIPTION = """Write a commented configuration, the smallest that runs, to start from.

  python -m pmd init --model Qwen/Qwen3-4B --data tasks.jsonl --gpu-gb 24 --out mine.yaml
  python -m pmd init --model tiny_exam --data tasks.jsonl --verifier my_rewards.accuracy --out mine.yaml

Then: python -m pmd check --config mine.yaml, and python -m pmd fit --config mine.yaml. Without --gpu-gb it is for a
CPU. Only the model's config.json is read, to choose between LoRA and QLoRA."""
#: Of the GPU, for the base in bfloat16; the rest is for adapters, activations and the KV cache.
SHARE_FOR_BASE = 0.45
TEXT = """\
# {what}
#   python -m pmd check --config {out}      tries everything that takes seconds
#   python -m pmd doctor --config {out}     predicts the memory
#   python -m pmd fit --config {out}        trains; `python -m pmd fit --help` lists every key
# Another method is one more file: --config configs/methods/grpo.yaml or sdpo.yaml.
method: pmd
model:
  path: {model}
  prompts: chat             # the tokenizer's own chat template; chat_template_kwargs may turn thinking on
  dtype: {dtype}
  finetune: {finetune:<15} # {why}
optimizer: {{lr: {lr}}}{rate_why}
data:
  task: jsonl               # also JSON, CSV, Parquet, or the id of a data set on the Hub; see data.columns
  path: {data}
{verifier}rollouts:
  engine: {engine:<17} # {engine_why}
  tasks_per_step: {tasks:<9} # x group_size = completions in one update
  group_size: 8
  max_new_tokens: {new:<9} # the longest answer
  max_prompt_tokens: {prompt:<6} # longer tasks are refused
teacher: {{max_prompt_tokens: {teacher}}}   # the task, an attempt and memory
reflection: {{max_new_tokens: {reflection}}}
verification:
  samples: 2                # completions for each validation task after an epoch
  final_samples: 8          # for each test task before and after training
trace_every: {trace:<14} # a step to look at: python -m pmd inspect step RUN, and RUN/completions/
trainer: {{max_epochs: {epochs}{accelerator}}}
"""


def main(argv: list[str]) -> int:
    """Write the file; return 0.

    Raises:
        ConfigError: the model's config.json cannot be read, the model does not fit, or the file exists.
    """
    parser = make_parser("init", DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="ID", help="Hugging Face id or folder of an instruct model")
    parser.add_argument("--data", required=True, metavar="FILE", help="tasks: a table, or a data set of the Hub")
    parser.add_argument("--verifier", metavar="NAME", help="of tasks that name none: exact, math, or a path of yours")
    parser.add_argument("--gpu-gb", type=float, metavar="GB", help="the GPU's memory (default: no GPU)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the configuration to write")
    options = parser.parse_args(argv)
    problems = [] if options.gpu_gb is None or options.gpu_gb > 0 else [f"--gpu-gb={options.gpu_gb} must be above 0."]
    if options.out.exists():
        problems.append(f"--out={options.out} exists; give another name.")
    if not options.out.absolute().parent.is_dir():
        problems.append(f"--out={options.out}: its folder does not exist; make it first.")
    if problems:
        raise ConfigError(problems)
    replace_text(options.out, configuration(options.model, options.data, options.verifier, options.gpu_gb, options.out))
    print(f"{options.out} is written; next: python -m pmd check --config {shlex.quote(str(options.out))}")
    return 0


def configuration(model: str, data: str, verifier: str | None, gpu_gb: float | None, out: Path) -> str:
    """Return the text of a configuration.

    Raises:
        ConfigError: the model does not fit on the GPU even in 4 bits.
    """
    finetune, why = _finetune(model, gpu_gb)
    on_gpu = gpu_gb is not None
    return TEXT.format(
        what=f"PMD on {data} with {model}, " + (f"one GPU of {gpu_gb:g} GB." if on_gpu else "on a CPU."),
        out=out, model=model, data=data, finetune=finetune, why=why,
        dtype="bfloat16" if on_gpu else "float32",
        lr="1.0e-4" if finetune != "full" else "1.0e-5",
        rate_why="  # for adapters; try 3.0e-5 to 3.0e-4" if finetune != "full" else "",
        verifier=f"  verifier: {verifier}\n" if verifier else "",
        engine="vllm" if on_gpu else "hf",
        engine_why="vLLM in this process" if on_gpu else "transformers, with the training weights",
        tasks=32 if on_gpu else 8,
        new=2048 if on_gpu else 256,
        prompt=2048 if on_gpu else 1024,
        teacher=6144 if on_gpu else 2048,
        reflection=512 if on_gpu else 256,
        trace=20 if on_gpu else 1,
        epochs=10 if on_gpu else 2,
        accelerator="" if on_gpu else ", accelerator: cpu",
    )  # fmt: skip


def _finetune(model: str, gpu_gb: float | None) -> tuple[str, str]:
    """Return how to train a model on a GPU, and why."""
    from pmd.config.schema import ModelConfig
    from pmd.planning.gpu_memory import read_shape

    shape = read_shape(ModelConfig(path=model))
    base_gb = 2 * (shape.linear + shape.embedding) / 1e9
    if gpu_gb is None:
        return ("full", "all weights") if base_gb < 1 else ("lora", "an adapter")
    if base_gb <= SHARE_FOR_BASE * gpu_gb:
        return "lora", f"an adapter on the base, {base_gb:.1f} GB in bfloat16"
    if base_gb / 3.5 <= SHARE_FOR_BASE * gpu_gb:  # 4 bits and their scales, embeddings in bfloat16
        return "qlora", f"an adapter on a base in 4 bits; in bfloat16 it has {base_gb:.1f} GB"
    raise ConfigError(
        f"--model={model} has {base_gb:.1f} GB in bfloat16, too much for --gpu-gb={gpu_gb:g} even in 4 bits; give a "
        "smaller model or a larger GPU."
    )
