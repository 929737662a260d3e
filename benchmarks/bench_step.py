"""A whole training step compared with TRL's SDPOTrainer: same rollouts, lengths, teacher and model, no generation.

    python benchmarks/bench_step.py --shape tiny
    python benchmarks/bench_step.py --shape 100m

TRL processes these rollouts as its trainer does: prompts are padded on the left and completions on the right over the
whole batch, then divided into micro-batches of `--trl-rows`; forward, loss and backward pass by
`SDPOTrainer.training_step`, then clipping and its AdamW. Its loop, logging and data loading are left out, while pmd
runs under Lightning with all of them. Full fine-tuning, frozen teacher, alpha 0.5, top-k 20 with tail, one thread.
Both alternate; the lowest time counts, in processor seconds, which a busy machine distorts less than the wall clock.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pmd.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.module import PMDModule
from pmd.planning.bench import measure_steps
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples
from pmd.pretrained import resolve_model_path

SHAPES = {
    # groups, group size, lengths, vocabulary
    "tiny": (16, 8, Lengths(40, 120, 4, 48), 110),
    "100m": (1, 8, Lengths(256, 384, 16, 128), 151_936),
}
TOP_K = 20


def write_model(shape: str, folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("tiny"))
    if shape == "tiny":
        model = Qwen3ForCausalLM.from_pretrained(resolve_model_path("tiny"), dtype=torch.float32)
    else:
        config = Qwen3Config(
            vocab_size=151_936, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pmd_module(folder: str, examples) -> tuple[PMDModule, FixedBatches]:
    config = RunConfig(
        model=ModelConfig(path=folder),
        teacher=TeacherConfig(kind="frozen"),
        objective=ObjectiveConfig(alpha=0.5, top_k=TOP_K, reduction="sequence", importance_clip=None, tis_cap=None),
        optimizer=OptimizerConfig(lr=1e-5, weight_decay=0.01),
        rollouts=RolloutsConfig(micro_batch_tokens=4096),
    )
    return PMDModule(config), FixedBatches(examples, 1)


def trl_step(folder: str, examples, rows: int):
    """Return a function that takes one step with TRL's trainer and returns its loss."""
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    from trl.trainer.utils import pad

    out = tempfile.mkdtemp()
    arguments = SDPOConfig(
        output_dir=out, per_device_train_batch_size=rows, gradient_accumulation_steps=len(examples) // rows,
        num_generations=8, distillation_alpha=0.5, distillation_mode="topk_logits", distillation_topk=TOP_K,
        distillation_add_tail=True, distillation_weight=1.0, teacher_model_kind="base", learning_rate=1e-5,
        weight_decay=0.01, bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = SDPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = len(examples) // rows

    def padded(sequences, side):
        tensors = [torch.tensor(ids) for ids in sequences]
        ids = pad(tensors, padding_value=0, padding_side=side)
        return ids, pad([torch.ones_like(t) for t in tensors], padding_value=0, padding_side=side)

    prompts, prompt_mask = padded([e.rollout.prompt_ids for e in examples], "left")
    shown, shown_mask = padded([e.context.prompt_ids for e in examples], "left")
    completions, completion_mask = padded([e.completion_ids for e in examples], "right")
    whole = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([shown, completions], 1),
        "teacher_attention_mask": torch.cat([shown_mask, completion_mask], 1),
        "self_distillation_mask": torch.ones(len(examples)),
    }
    parts = [{k: v[i : i + rows] for k, v in whole.items()} for i in range(0, len(examples), rows)]
    trainer._prepare_inputs = lambda part: part
    model.train()

    def step() -> float:
        loss = sum(trainer.training_step(model, part, None).item() for part in parts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return loss

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--trl-rows", type=int, default=8, help="rollouts in one of TRL's micro-batches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    groups, group_size, lengths, vocabulary = SHAPES[arguments.shape]
    examples = synthetic_examples(groups, group_size, lengths, vocabulary)
    tokens = sum(len(e.rollout.prompt_ids) + len(e.completion_ids) for e in examples)
    with tempfile.TemporaryDirectory() as folder:
        write_model(arguments.shape, folder)
        module, batches = pmd_module(folder, examples)
        step = trl_step(folder, examples, arguments.trl_rows)
        seconds: dict[str, list[float]] = {"pmd": [], "trl": []}
        losses: dict[str, list[float]] = {"pmd": [], "trl": []}
        for _ in range(1 + arguments.repeats):
            (record,) = measure_steps(module, batches, 1, "cpu").steps
            seconds["pmd"].append(record.cpu_s)
            losses["pmd"].append(record.loss)
            started = time.process_time()
            losses["trl"].append(step())
            seconds["trl"].append(time.process_time() - started)
    speed = {name: tokens / min(times[1:]) for name, times in seconds.items()}
    result = {
        "shape": arguments.shape,
        "rollouts": len(examples),
        "tokens": tokens,
        "tokens_per_cpu_s": speed,
        "speedup": speed["pmd"] / speed["trl"],
        "first_loss": {name: values[0] for name, values in losses.items()},
        "loss_difference": abs(losses["pmd"][0] - losses["trl"][0]),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result | {"seconds": seconds, "losses": losses}, indent=1))


if __name__ == "__main__":
    main()
