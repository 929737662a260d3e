"""The distillation loss on a GPU: time, memory and error of every way to compute it.

    python benchmarks/gpu/loss.py --json loss.json            # under a minute on an H100 or H200
    TRITON_INTERPRET=1 python benchmarks/gpu/loss.py          # on a CPU: tiny shapes, a rehearsal without meaning

V=151,936, H=4,096, k=100, alpha .5, bfloat16 hidden states and frozen head, as for Qwen3-8B with LoRA. `whole` is the
loss and its gradient w.r.t. the student's hidden states, with the peak of memory beside the inputs in `extra_gb`;
`limit` is the three products with the head alone. `parts` times each product and kernel on one chunk. `error` compares
a few tokens with float64, `||found - exact|| / ||exact||`, for flat and for peaked distributions.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pmd.losses import distillation, fused
from pmd.losses.distillation import TeacherPart, TokenTerms


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 151_936
    hidden: int = 4096
    top_k: int = 100
    tokens: tuple[int, ...] = (2048, 8192)
    checked: int = 64  # tokens compared with float64
    trained: int = 2048  # tokens with a trained head
    repeats: int = 5


TINY = Sizes(vocabulary=200, hidden=16, top_k=5, tokens=(4,), checked=4, trained=4, repeats=1)


@dataclass(frozen=True)
class Inputs:
    student: Tensor
    teacher: Tensor
    head: Tensor
    targets: Tensor

    def first(self, tokens: int) -> "Inputs":
        return Inputs(self.student[:tokens], self.teacher[:tokens], self.head, self.targets[:tokens])


def draw(device: torch.device, sizes: Sizes, scale: float = 1.0) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    student = scale * randn(max(sizes.tokens), sizes.hidden)
    teacher = student + 0.3 * scale * randn(max(sizes.tokens), sizes.hidden)
    head = 0.02 * randn(sizes.vocabulary, sizes.hidden)
    targets = torch.randint(sizes.vocabulary, (max(sizes.tokens),), generator=generator, device=device)
    return Inputs(student, teacher, head, targets)


Score = Callable[..., TokenTerms]


def plans(device: torch.device) -> dict[str, Any]:
    """The kernels' plans to compare, the default first; empty without Triton."""
    if not fused.has_kernels() if device.type == "cuda" else not interprets():
        return {}
    from pmd.losses.fused_triton import Plan
    from pmd.losses.triton_kernels import Launch

    if device.type == "cpu":
        small = Launch(lanes=64, select_lanes=64, capacity=64)
        return {"triton": Plan(launch=small, slab_tokens=80), "triton, torch.topk": Plan(launch=small, sorts=True)}
    return {
        "triton": Plan(),
        "triton, 1 stage": Plan(launch=Launch(stages=1)),
        "triton, 4,096 lanes, 16 warps": Plan(launch=Launch(warps=16)),
        "triton, 8,192 lanes, 16 warps": Plan(launch=Launch(lanes=8192, warps=16)),
        "triton, select 2,048 lanes, 4 warps": Plan(launch=Launch(select_warps=4)),
        "triton, select 4,096 lanes, 16 warps": Plan(launch=Launch(select_lanes=4096, select_warps=16)),
        "triton, select 1,024 lanes, 4 warps": Plan(launch=Launch(select_lanes=1024, select_warps=4)),
        "triton, torch.topk": Plan(sorts=True),
        "triton, bfloat16 logits": Plan(logits_dtype=torch.bfloat16),
        "triton, chunks of 512": Plan(chunk_tokens=512),
        "triton, slabs of 32,768": Plan(slab_tokens=32_768),
    }


def interprets() -> bool:
    import importlib.util
    import os

    return importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def pmd_loss(score: Score, sizes: Sizes, with_teacher: bool, inputs: Inputs) -> Tensor:
    """The mean divergence, or without a teacher the mean log-prob."""
    if not with_teacher:
        return score(inputs.student, inputs.head, inputs.targets).student_logprobs.mean()
    teacher = [TeacherPart(inputs.teacher, inputs.head)]
    terms = score(inputs.student, inputs.head, inputs.targets, teacher, alpha=0.5, top_k=sizes.top_k)
    assert terms.per_token_divergence is not None
    return terms.per_token_divergence.mean()


def trl_loss(sizes: Sizes, inputs: Inputs) -> Tensor:
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    student_logits = inputs.student @ inputs.head.T
    with torch.no_grad():
        teacher_logits = inputs.teacher @ inputs.head.T
    return compute_topk_self_distillation_loss(
        student_logits,
        teacher_logits,
        distillation_topk=sizes.top_k,
        distillation_alpha=0.5,
        distillation_add_tail=True,
    ).mean()


def three_products(inputs: Inputs) -> Tensor:
    """What cannot be saved: the logits of student and teacher, and the gradient w.r.t. the hidden states."""
    for rows in torch.arange(len(inputs.targets)).split(1024):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        logits = inputs.student.detach()[here] @ inputs.head.T
        inputs.teacher[here] @ inputs.head.T
        logits @ inputs.head
    return inputs.student.sum()


def clock(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of one run: the median of a few, after one that compiles and warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def time_loss(loss_of: Callable[[Inputs], Tensor], inputs: Inputs, sizes: Sizes, trains_head: bool) -> dict[str, Any]:
    """Time one loss and its gradient; `extra_gb` is the peak of allocated memory beside the inputs."""
    device = inputs.head.device
    student, head = inputs.student.clone().requires_grad_(), inputs.head.requires_grad_(trains_head)
    inputs = replace(inputs, student=student)
    value = 0.0

    def run() -> None:
        nonlocal value
        student.grad = head.grad = None
        loss = loss_of(inputs)
        loss.backward()
        value = loss.detach()

    milliseconds, extra = clock(run, device, sizes.repeats), None
    if device.type == "cuda":
        student.grad = head.grad = None
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        extra = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    head.requires_grad_(False).grad = None
    return {"ms": milliseconds, "extra_gb": extra, "value": float(value)}


def whole(device: torch.device, sizes: Sizes, quick: bool) -> list[dict[str, Any]]:
    """Time every way to compute the loss."""
    from importlib.util import find_spec

    inputs, rows = draw(device, sizes), []
    kernels: dict[str, Score] = {
        name: partial(kernel_score(), plan=plan)
        for name, plan in plans(device).items()
    }  # fmt: skip
    ways: dict[str, tuple[Callable[[Inputs], Tensor], bool, bool]] = {"limit": (three_products, False, True)}
    for name, score in kernels.items():
        ways[name] = (partial(pmd_loss, score, sizes, True), False, True)
    ways["torch"] = (partial(pmd_loss, fused.torch_token_terms, sizes, True), False, True)
    if find_spec("trl") is not None:
        ways["TRL"] = (partial(trl_loss, sizes), False, True)
    if not quick:
        ways["reference"] = (partial(pmd_loss, distillation.token_terms, sizes, True), False, False)
    for name, score in [*list(kernels.items())[:1], ("torch", fused.torch_token_terms)]:
        ways[f"{name}, no teacher"] = (partial(pmd_loss, score, sizes, False), False, False)
        ways[f"{name}, head trained"] = (partial(pmd_loss, score, sizes, True), True, False)
    for name, (loss, trains_head, at_all_sizes) in ways.items():
        for tokens in sizes.tokens if at_all_sizes else [sizes.trained]:
            found = attempt(partial(time_loss, loss, inputs.first(tokens), sizes, trains_head))
            rows.append({"way": name, "tokens": tokens} | found)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def kernel_score() -> Score:
    from pmd.losses import fused_triton

    return fused_triton.token_terms


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or why it failed: one way that fails must not hide the others."""
    try:
        return run()
    except Exception as error:
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def parts(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Time each product and kernel on one chunk of 1,024 tokens."""
    from pmd.losses import fused_triton as triton
    from pmd.losses.triton_kernels import Gradient, absorb, empty_rows, select, write_gradient

    tokens = min(1024, max(sizes.tokens))
    inputs, rows = draw(device, sizes).first(tokens), []
    logits = torch.empty(tokens, sizes.vocabulary, device=device)
    product = partial(triton._product, inputs.student, inputs.head.T)
    product(logits)
    picks = inputs.targets[:, None].repeat(1, sizes.top_k + 1).int()
    ones, zeros = torch.ones(tokens, device=device), torch.zeros(tokens, device=device)
    values = torch.zeros(tokens, sizes.top_k + 1, device=device)

    def note(name: str, run: Callable[[], object]) -> None:
        found = attempt(lambda: {"ms": clock(run, device, sizes.repeats)})
        rows.append({"part": name, "tokens": tokens} | found)
        print(json.dumps(rows[-1]), flush=True)

    launches = {n: p.launch for n, p in plans(device).items() if not p.sorts and p.logits_dtype == torch.float32}
    note("logits, float32", partial(product, logits))
    note("logits, bfloat16", partial(torch.mm, inputs.student, inputs.head.T))
    note("torch.topk", partial(torch.topk, logits, sizes.top_k, dim=-1, sorted=False))
    for name, launch in launches.items():
        note(f"select ({name})", partial(select, logits, inputs.targets, sizes.top_k, 1.0, launch))
        note(f"absorb ({name})", partial(absorb, logits, 0, 0, 1.0, empty_rows(picks), launch))
    gradient = Gradient(zeros + 20.0, ((ones, zeros),), picks, values)
    for name, launch in launches.items():
        note(f"gradient ({name})", partial(write_gradient, logits, gradient, 1.0, torch.bfloat16, launch))
        product(logits)
    narrow = logits.view(torch.bfloat16)[:, : sizes.vocabulary].normal_()
    out = torch.empty_like(inputs.student)
    note("hidden states' gradient", partial(torch.mm, narrow, inputs.head, out=out))
    return rows


def errors(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Compare every way with float64 on the same numbers, for flat and for peaked distributions."""
    rows = []
    kernels = {name: partial(kernel_score(), plan=plan) for name, plan in plans(device).items()}
    wanted = ("triton", "triton, torch.topk", "triton, bfloat16 logits")
    ways = {name: score for name, score in kernels.items() if name in wanted}
    ways |= {"torch": fused.torch_token_terms, "reference": distillation.token_terms}
    for shape, scale in (("flat", 1.0), ("peaked", 4.0)):
        inputs = draw(device, replace(sizes, tokens=(sizes.checked,)), scale)
        wide = Inputs(inputs.student.double(), inputs.teacher.double(), inputs.head.double(), inputs.targets)
        exact = terms_and_gradient(distillation.token_terms, wide, sizes)
        for name, score in ways.items():
            found = attempt(partial(compare, score, inputs, sizes, exact))
            rows.append({"way": name, "distribution": shape} | found)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def terms_and_gradient(score: Score, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
    student = inputs.student.detach().clone().requires_grad_()
    teacher = [TeacherPart(inputs.teacher, inputs.head)]
    terms = score(student, inputs.head, inputs.targets, teacher, alpha=0.5, top_k=sizes.top_k)
    assert terms.per_token_divergence is not None
    (gradient,) = torch.autograd.grad(terms.per_token_divergence.sum(), student)
    return {
        "logprobs": terms.student_logprobs.detach(),
        "entropy": terms.entropy,
        "divergence": terms.per_token_divergence.detach(),
        "gradient": gradient,
    }


def compare(score: Score, inputs: Inputs, sizes: Sizes, exact: dict[str, Tensor]) -> dict[str, Any]:
    found = terms_and_gradient(score, inputs, sizes)
    apart = {name: (found[name].double() - exact[name]).norm() / exact[name].norm() for name in exact}
    lowest = found["divergence"].min().item()
    return {name: value.item() for name, value in apart.items()} | {"smallest divergence": lowest}


def measure(device: torch.device | str, quick: bool) -> dict[str, Any]:
    """Return `whole`, `parts` and `error`; `quick` leaves out the reference, which takes longest."""
    device = torch.device(device)
    sizes = Sizes() if device.type == "cuda" else TINY
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "whole": whole(device, sizes, quick),
        "error": errors(device, sizes),
    }
    found["parts"] = parts(device, sizes) if plans(device) else []
    return found


def show(found: dict[str, Any]) -> None:
    console = Console(width=140)
    for part in ("parts", "error", "whole"):
        columns = list(dict.fromkeys(key for row in found[part] for key in row))
        table = Table(*columns, title=f"{part}, {found['device']}")
        for row in found[part]:
            table.add_row(*(f"{row[c]:.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="without the reference implementation")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.device, arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
