"""Measures what one rank costs against no ranks at all: the same run plain, and under torchrun with ddp and fsdp2.

python benchmarks/bench_ranks.py [--rounds 3] [--steps 6] [--hidden 512] [--layers 8] [-- ARGUMENTS OF FIT]

A Qwen3 with random weights trains on made-up questions, in one process each time; the kinds alternate. Prints the
median seconds of a step's training (teacher, student, backward pass, sum of gradients, optimizer), of its generation,
and of the processor in both, and how much more than the plain path each kind takes. On a busy CPU only the processor's
seconds mean something. Groups have one rollout: without packed rows, ranks that divide the weights share no prompts,
which is a cost of its own. On a GPU, for example:
  python benchmarks/bench_ranks.py --hidden 2048 --layers 24 -- --trainer.accelerator=gpu --model.dtype=bfloat16
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from questions import make_questions
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from pmd.run_dir import RunDir
from pmd.tiny import shipped_model_path

ROOT = Path(__file__).parents[1]
KINDS = ("plain", "ddp", "fsdp2")
TRAINS = ("student", "teacher", "reference", "backward", "sum_gradients", "optimizer")
CONFIG = [
    "--config", "configs/tiny_sciknoweval.yaml", "--data.max_train=null", "--data.max_test=2",
    "--data.max_validation=2", "--rollouts.tasks_per_step=16", "--rollouts.group_size=1",
    "--rollouts.max_new_tokens=64", "--verification.final_samples=1", "--verification.samples=1",
    "--verification.pass_at=[1]", "--memory.enabled=false", "--teacher.context=sibling", "--teacher.feedback=true",
    "--trainer.max_epochs=1",
]  # fmt: skip


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """Write a Qwen3 with random weights, and the tokenizer of the shipped exam model."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path("tiny_exam"))
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million weights", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the runs are other processes
    return folder


def train(kind: str, arguments: list[str], run: RunDir) -> dict[str, list[float]]:
    """Train once; return the seconds of each step but the first: training, generation, processor."""
    launcher = [sys.executable, "-m"]
    if kind != "plain":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "-m"]
        arguments = [*arguments, f"--trainer.strategy={kind}"]
    command = [*launcher, "pmd", "fit", *CONFIG, *arguments, f"--run_dir={run.root}"]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    rows = [row for row in run.read_metrics() if row.get("time/backward_s")][1:]
    return {
        "trains": [sum(float(row.get(f"time/{part}_s") or 0.0) for part in TRAINS) for row in rows],
        "generates": [float(row["time/rollout_s"]) for row in rows],
        "computes": [float(row["time/cpu_s"]) for row in rows],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=6, help="of each run (default: 6)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model, a multiple of 128 (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="(default: 8)")
    parser.add_argument("fit", nargs="*", help="further arguments of pmd fit, behind --")
    options = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)  # by kind and what takes them
    with tempfile.TemporaryDirectory(prefix="bench_ranks_") as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model", options.hidden, options.layers)
        questions = make_questions(folder, 32 * options.steps)
        arguments = [f"--model.path={model}", f"--data.path={questions}", f"--trainer.max_steps={options.steps}"]
        for number in range(options.rounds):
            for kind in KINDS:
                found = train(kind, [*arguments, *options.fit], RunDir(folder / f"{kind}-{number}"))
                for what, values in found.items():
                    seconds[kind, what] += values
                print(f"{kind} trains {[f'{s:.2f}' for s in found['trains']]} s", flush=True)
    for kind in KINDS:
        shown = []
        for what in found:
            median, plain = (statistics.median(seconds[name, what]) for name in (kind, "plain"))
            shown.append(f"{what} {median:.3f} s ({median / plain - 1:+.1%})")
        print(f"{kind}, the median step {', '.join(shown)} ({len(seconds[kind, 'trains'])} steps)")


if __name__ == "__main__":
    main()
