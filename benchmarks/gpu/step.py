"""Training steps of Qwen3-8B and 4B with LoRA on one GPU: seconds by part, tokens per second, peak memory, by mode.

    python benchmarks/gpu/step.py --quick                         what matters most, about 150 s on an H200
    python benchmarks/gpu/step.py --parts table,longest           some parts, all modes
    python benchmarks/gpu/step.py --parts table --modes packed    the modes whose names begin so

Random weights are built on the device and rollouts are random ids; the trainer's own step runs under Lightning, one to
warm up and one or two that are measured. Without a GPU, a rehearsal at a tiny shape: its figures mean nothing.

`tokens_per_s` counts prompt and completion of every rollout, whether or not a prompt was shared. `tflops_computed`
counts the work on tokens that were computed: 4 operations per weight and student token, 2 per teacher token;
`tflops_rows` counts every row whole, which is what a trainer that shares nothing would have computed in that time.
"""

import argparse
import functools
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from pmd import attention_kernels as kernels
from pmd.attention import attend_packed
from pmd.attention_kernels import Call, Segments
from pmd.batch import pack_rows
from pmd.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.module import PMDModule
from pmd.packing import moved
from pmd.planning.bench import measure_steps, summarise
from pmd.planning.choose_memory import choose
from pmd.planning.gpu_memory import shape_of
from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples
from pmd.pretrained import prepare_base

PARTS = ("table", "uneven", "long", "qlora", "attention", "kernels", "longest")
QUICK_PARTS = ("table", "uneven", "long", "qlora")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """The rollouts of one step."""

    groups: int
    group_size: int
    lengths: Lengths

    def on(self, device: str) -> "Workload":
        """Return this workload, or on a CPU one whose rows have a hundredth of the length."""
        if device == "cuda":
            return self
        sizes = (self.lengths.prompt, self.lengths.teacher_prompt, self.lengths.min_completion)
        return replace(self, lengths=Lengths(*(max(8, n // 64) for n in (*sizes, self.lengths.max_completion))))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths.prompt, self.lengths.teacher_prompt) + self.lengths.max_completion


@dataclass(frozen=True)
class Mode:
    """How a step is computed. Tokens of a micro-batch are `auto`, or a number."""

    name: str
    attention: str = "varlen"
    share: str = "both"
    checkpointing: bool | str = "auto"
    tokens: int | str = "auto"
    kernels: str = "auto"
    in_quick: bool = True


TABLE = Workload(2, 8, Lengths(2048, 4096, 1024, 1024))
UNEVEN = Workload(2, 8, Lengths(2048, 4096, 512, 4096))
LONG_ALONE = Workload(4, 1, Lengths(8192, 8192, 8192, 8192))
LONG_GROUP = Workload(1, 4, Lengths(8192, 8192, 8192, 8192))
QLORA = Workload(1, 4, Lengths(3072, 3072, 1024, 1024))

#: The most telling first: a session may end early. Plain kernels come before others, which stay once they are chosen.
MODES = (
    Mode("packed, shared, all recomputed, plain kernels", checkpointing=True, tokens=16384, kernels="plain"),
    Mode("packed, shared, auto"),
    Mode("packed, shared, all recomputed", checkpointing=True, tokens=16384),
    Mode("padded, teacher's prompts shared, all recomputed", "sdpa", "teacher", True, 16384),
    Mode("packed, nothing shared, all recomputed", share="off", checkpointing=True, tokens=16384),
    Mode("packed, shared, auto, compiled layers", kernels="compiled"),
    Mode("packed, shared, selective", checkpointing="selective", tokens=12288, in_quick=False),
    Mode("packed, shared, nothing recomputed", checkpointing=False, tokens=6144, in_quick=False),
    Mode("packed, shared, all recomputed, large", checkpointing=True, tokens=32768, in_quick=False),
    Mode("packed, nothing shared, auto", share="off", in_quick=False),
    Mode("padded, shared, nothing recomputed", "sdpa", "both", False, 8192, in_quick=False),
)


class OnDevice(PMDModule):
    """Stays on its device when Lightning is done with it: the next measurement goes on there."""

    def cpu(self) -> "OnDevice":
        """Do nothing."""
        return self


def measure(device: str, quick: bool, parts: tuple[str, ...] = (), modes: str = "") -> Iterator[Figures]:
    """Yield the figures of the parts, growing with every mode.

    Args:
        device: `cuda` or `cpu`.
        parts: some of PARTS; none is all of them, or those of the quick set.
        modes: only modes whose names begin with this.
    """
    warnings.filterwarnings("ignore")
    chosen = [mode for mode in MODES if mode.name.startswith(modes) and (mode.in_quick or not quick)]
    parts = parts or (QUICK_PARTS if quick else PARTS)
    found: Figures = {}
    for name in (part for part in PARTS if part in parts):
        found[name] = figures = {}
        for key, value in MEASURED[name](device, chosen):
            figures[key] = value
            yield found
        release()


def measure_table(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """2 problems x 8 rollouts; prompts of 2,048, the teacher's of 4,096, completions of 1,024."""
    yield from measure_modes(architecture("8b", device), TABLE.on(device), modes, device)


def measure_uneven(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """The same with completions of 512 to 4,096 tokens."""
    yield from measure_modes(architecture("8b", device), UNEVEN.on(device), with_default_kernels(modes)[:3], device)


def measure_long(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """Qwen3-4B, 4 rollouts of 8,192 + 8,192 tokens: of one prompt, and of four."""
    for name, workload in (("four prompts", LONG_ALONE), ("one prompt", LONG_GROUP)):
        for mode, figures in measure_modes(
            architecture("4b", device), workload.on(device), with_default_kernels(modes)[:2], device
        ):
            yield f"{name}, {mode}", figures


def with_default_kernels(modes: list[Mode]) -> list[Mode]:
    """Return the modes that leave norms, rotary embedding and SwiGLU to `auto`."""
    return [mode for mode in modes if mode.kernels == "auto"]


def measure_qlora(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """Qwen3-8B on a 4-bit base at 4,096 tokens: is it under 24 GB?"""
    if device != "cuda":
        return
    mode = Mode("packed, shared, all recomputed", checkpointing=True, tokens=4096)
    yield from measure_modes(architecture("8b", device), QLORA, [mode], device, finetune="qlora")


def measure_attention(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """Attention alone, forward and backward, over the table's rows: one layer of Qwen3-8B, the teacher's side."""
    workload = TABLE.on(device)
    examples = synthetic_examples(1, workload.group_size, workload.lengths, 100)
    pairs = [(example.context.prompt_ids, example.completion_ids) for example in examples]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, shares, gather in (("whole rows", False, False), ("merged", True, False), ("gathered", True, True)):
        packed = moved(pack_rows(pairs, [0] * len(pairs), shares), torch.device(device))
        parts = [
            torch.randn(packed.num_real_tokens, heads, 128, device=device, dtype=dtype, requires_grad=True)
            for heads in (32, 8, 8)
        ]

        def once(parts=parts, layout=packed.layout, gather=gather) -> None:
            attend_packed(*parts, layout, scale=0.1, gather=gather).sum().backward()

        yield name, {"seconds": seconds_of(once, device, 5 if device == "cuda" else 1), "tokens": len(parts[0])}


def measure_kernels(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """Attention of one row to itself, one layer of Qwen3-8B: flash attention beside cuDNN's; on a CPU the plain one."""
    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "flash": (kernels._flash_forward, kernels._flash_backward),
        "cudnn": (kernels._long_forward, kernels._long_backward),
    }
    if device != "cuda":
        ways = {"plain": (kernels._plain_forward, kernels._plain_backward)}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for tokens in (1024, 2048, 4096, 8192, 16384) if device == "cuda" else (64,):
        row = Segments(torch.tensor([0, tokens], dtype=torch.int32, device=device), (tokens,))
        call, figures = Call(row, row, 128**-0.5), {}
        query, key, value = (torch.randn(tokens, heads, 128, device=device, dtype=dtype) for heads in (32, 8, 8))
        for name, (forward, backward) in ways.items():
            started = time.perf_counter()
            out, lse = forward(query, key, value, call)
            wait(device)
            figures[f"{name}_first_s"] = time.perf_counter() - started
            inputs = (query, key, value, call)
            given = (query, query, key, value, out, lse, call)
            figures[f"{name}_forward_s"] = seconds_of(functools.partial(forward, *inputs), device, 5)
            figures[f"{name}_backward_s"] = seconds_of(functools.partial(backward, *given), device, 5)
        yield f"{tokens} tokens", figures


def measure_longest(device: str, modes: list[Mode]) -> Iterator[tuple[str, Figures]]:
    """The longest sequence, with its teacher's, that a step fits into 80 GB."""
    for finetune in ("lora", "qlora") if device == "cuda" else ("lora",):
        for offload in (False, True) if device == "cuda" else (False,):
            yield f"{finetune}{', offloaded' if offload else ''}", longest_sequence(finetune, device, offload=offload)
            release()


#: What each part measures.
MEASURED: dict[str, Callable[[str, list[Mode]], Iterator[tuple[str, Figures]]]] = {
    "table": measure_table, "uneven": measure_uneven, "long": measure_long, "qlora": measure_qlora,
    "attention": measure_attention, "kernels": measure_kernels, "longest": measure_longest,
}  # fmt: skip


def architecture(size: str, device: str) -> Qwen3Config:
    """Return the shape of Qwen3-8B or Qwen3-4B; on a CPU a tiny one."""
    if device != "cuda":
        return Qwen3Config(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=size == "4b",
        )  # fmt: skip
    hidden, intermediate = {"8b": (4096, 12288), "4b": (2560, 9728)}[size]
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=size == "4b",
        max_position_embeddings=40_960, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip


def run_config(workload: Workload, mode: Mode, device: str, finetune: str, *, offload: bool = False) -> RunConfig:
    """Return the run that trains on such rollouts in this mode; `auto` is left as it is."""
    lengths, on_gpu = workload.lengths, device == "cuda"
    return RunConfig(
        model=ModelConfig(
            path="tiny",  # for its tokenizer alone
            dtype="bfloat16" if on_gpu else "float32",
            finetune=finetune,
            lora_rank=32 if on_gpu else 4,
            gradient_checkpointing=mode.checkpointing,
            attention=mode.attention,
            layer_kernels=mode.kernels if on_gpu else "plain",
            offload_activations=offload,
        ),
        teacher=TeacherConfig(max_prompt_tokens=lengths.teacher_prompt),
        objective=ObjectiveConfig(
            alpha=0.5, top_k=100, reduction="sequence", importance_clip=2.0, tis_cap=2.0, implementation="fused"
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        rollouts=RolloutsConfig(
            tasks_per_step=workload.groups, group_size=workload.group_size, max_prompt_tokens=lengths.prompt,
            max_new_tokens=lengths.max_completion, micro_batch_tokens=mode.tokens, share_prefixes=mode.share,
            engine="vllm_server",
        ),
    )  # fmt: skip


def measure_modes(
    shape: Qwen3Config, workload: Workload, modes: list[Mode], device: str, finetune: str = "lora"
) -> Iterator[tuple[str, Figures]]:
    """Yield each mode's figures on one model; a mode that fails says why, and the others go on."""
    started = time.perf_counter()
    base = random_base(shape, device, finetune)
    lengths = workload.lengths
    examples = synthetic_examples(workload.groups, workload.group_size, lengths, shape.vocab_size)
    module = None
    for mode in modes:
        run = settled(shape, run_config(workload, mode, device, finetune), device)
        try:
            if module is None:
                module = OnDevice(run, prepare_base(base, run.model)).to(device)
                print(f"model built in {time.perf_counter() - started:.1f} s", file=sys.stderr)
            reconfigure(module, base, run)
            yield mode.name, measure_mode(module, examples, run, device)
        except Exception as error:
            yield mode.name, {"problem": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        release()


def measure_mode(module: OnDevice, examples: list, run: RunConfig, device: str, steps: int = 2) -> Figures:
    """Take steps; return the figures of all but the first."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    measured = measure_steps(module, FixedBatches(examples, steps), steps, "gpu" if device == "cuda" else "cpu")
    figures, counts = summarise(measured), measured.steps[-1].tokens
    training_s = figures["tokens_per_step"] / figures["training_tokens_per_s"]
    prompts = sum(len(example.context.prompt_ids) + len(example.completion_ids) for example in examples)
    share = (4 * counts.sequences + 2 * prompts) / (4 * counts.student + 2 * counts.teacher)
    kept = {name: figures[name] for name in ("seconds", "training_tokens_per_s", "peak_memory_gb") if name in figures}
    return kept | {
        "training_s": training_s,
        "tflops_computed": figures["tflops_per_s"],
        "tflops_rows": figures["tflops_per_s"] * share,
        "tokens": counts.sequences,
        "student_tokens_computed": counts.student,
        "teacher_tokens_computed": counts.teacher,
        "micro_batch_tokens": module.layout.max_tokens,  # fewer than asked for if memory ran out
        "recomputed": str(run.model.gradient_checkpointing),
        "loss": measured.steps[-1].loss,
        "took_s": time.perf_counter() - started,
    }


def settled(shape: Qwen3Config, run: RunConfig, device: str) -> RunConfig:
    """Return the run with what `auto` means on this GPU, with the model not yet on it."""
    if device != "cuda":
        return replace(run, model=replace(run.model, gradient_checkpointing=run.model.gradient_checkpointing is True))
    return choose(shape_of(shape), run, torch.cuda.mem_get_info()[1] - 1.5e9).applied(run)


def reconfigure(module: OnDevice, base: PreTrainedModel, run: RunConfig) -> None:
    """Let a module compute in another mode, through the trainer's own set-up of its base."""
    for layer in base.modules():
        layer._compiled_call_impl = None
    prepare_base(base, run.model)
    module.train()
    module.layout = module._layout(run)
    module.offloads = run.model.offload_activations


def random_base(shape: Qwen3Config, device: str, finetune: str) -> PreTrainedModel:
    """Return a model with random weights on the device, with 4-bit linear layers for QLoRA."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    if finetune == "qlora":
        quantize(model)
    return model


def quantize(model: PreTrainedModel) -> None:
    """Replace linear layers but the head by 4-bit ones, as loading with bitsandbytes does."""
    import bitsandbytes as bnb

    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]
    for name, layer in layers:
        if name == "lm_head":
            continue
        parent, _, child = name.rpartition(".")
        small = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        small.weight = weight.to("cuda")
        setattr(model.get_submodule(parent), child, small)
        layer.weight = None
    model.is_loaded_in_4bit = True


def longest_sequence(finetune: str, device: str, *, offload: bool, budget: float = 80e9) -> Figures:
    """Find the longest sequence of a step in `budget` bytes: peak memory at two lengths, a line, and one proof."""
    shape = architecture("8b", device)
    mode, peaks, module = Mode("longest", checkpointing=True, tokens=1), {}, None
    base = random_base(shape, device, finetune)

    def peak(length: int) -> tuple[float, float]:
        nonlocal module
        completion = min(1024, length // 2)
        workload = Workload(1, 1, Lengths(length - completion, length - completion, completion, completion))
        run = run_config(workload, mode, device, finetune, offload=offload)
        if module is None:
            module = OnDevice(run, prepare_base(base, run.model)).to(device)
        reconfigure(module, base, run)
        figures = measure_mode(
            module, synthetic_examples(1, 1, workload.lengths, shape.vocab_size), run, device, steps=1
        )
        release()
        return figures["peak_memory_gb"] * 1e9, figures["training_s"]

    if device != "cuda":
        return {"tokens": 64, "peak_memory_gb": peak(64)[0] / 1e9}
    peak(4096)  # the optimizer has its state from here on
    peaks = {length: peak(length)[0] for length in (8192, 24576)}
    slope = (peaks[24576] - peaks[8192]) / (24576 - 8192)
    length = int((0.96 * budget - peaks[8192]) / slope + 8192) // 1024 * 1024
    line = {f"peak_memory_gb_at_{tokens}": size / 1e9 for tokens, size in peaks.items()}
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info()[1]))
    try:
        size, seconds = peak(length)
    except Exception as error:
        return line | {"predicted_tokens": length, "problem": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return line | {"tokens": length, "peak_memory_gb": size / 1e9, "training_s": seconds}


def seconds_of(once: Callable[[], None], device: str, repeats: int) -> float:
    """Return the mean seconds of a call, after one to warm up."""
    once()
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        once()
    wait(device)
    return (time.perf_counter() - started) / repeats


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Return freed memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(found: Figures) -> None:
    """Print one line for each mode."""
    for part, modes in found.items():
        for mode, figures in modes.items():
            print(f"{part:10s} {mode:50s} {_line(figures)}")


def _line(figures: Figures) -> str:
    if "problem" in figures or "seconds" not in figures or not isinstance(figures["seconds"], dict):
        return ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    parts = figures["seconds"]
    times = " ".join(f"{part} {parts[part]:.2f}" for part in ("teacher", "student", "backward") if part in parts)
    return (
        f"{times} step {figures['training_s']:.2f} s, {figures['training_tokens_per_s']:,.0f} tok/s, "
        f"{figures['tflops_computed']:.0f} TFLOP/s ({figures['tflops_rows']:.0f} by rows), "
        f"{figures['peak_memory_gb']:.1f} GB, {figures['micro_batch_tokens']} tokens, "
        f"recomputed {figures['recomputed']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="", help=f"some of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--modes", default="", help="only modes whose names begin so")
    parser.add_argument("--quick", action="store_true", help="the most telling parts and modes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, after every mode")
    arguments = parser.parse_args()
    parts = tuple(filter(None, arguments.parts.split(",")))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts names {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    for found in measure(device, arguments.quick, parts, arguments.modes):
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    print(torch.cuda.get_device_name() if device == "cuda" else "cpu: a rehearsal")
    show(found)


if __name__ == "__main__":
    main()
