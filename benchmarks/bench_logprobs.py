"""The cost of the distillation loss with a real vocabulary: `losses.fused`, and TRL's SDPO loss on the same tensors.

    python benchmarks/bench_logprobs.py --json logprobs.json
    python benchmarks/bench_logprobs.py --implementation reference        # the readable one, by autograd

From hidden states [N, H] of student and teacher and one frozen output head [V, H], both compute the loss and its
gradient w.r.t. the student's hidden states (top-k support of the student, tail bucket). TRL's function receives the
whole logits, as in its trainer; its division by the temperature, one more copy, is left out. Each measurement runs in
its own process. `extra_mb` is the peak of its resident memory above that of the inputs, `cpu_s` the processor time
of forward and backward pass, which a busy machine distorts less than the wall clock.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

COLUMNS = ("loss_of", "tokens", "extra_mb", "cpu_s", "wall_s", "loss")


def memory_mb(field: str) -> float:
    """Read VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(name: str, tokens: int, arguments: argparse.Namespace) -> dict[str, float | str | int]:
    """Compute loss and gradient once, in this process."""
    import torch

    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, arguments.hidden)
    head = torch.empty(arguments.vocabulary, arguments.hidden).normal_(0, 0.02, generator=generator)
    student = torch.empty(shape).normal_(generator=generator).requires_grad_()
    teacher = student.detach() + 0.3 * torch.empty(shape).normal_(generator=generator)
    targets = torch.randint(arguments.vocabulary, (tokens,), generator=generator)
    loss_of = trl_loss if name == "trl" else partial(pmd_loss, name)
    warm = slice(0, 2)  # loads kernels and code before the measurement
    loss_of(student[warm], teacher[warm], head[:1000], targets[warm] % 1000, arguments.top_k).backward()
    student.grad = None

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, cpu, wall = memory_mb("VmRSS"), time.process_time(), time.perf_counter()
    loss = loss_of(student, teacher, head, targets, arguments.top_k)
    loss.backward()
    return {
        "loss_of": name,
        "tokens": tokens,
        "extra_mb": memory_mb("VmHWM") - before,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "loss": loss.item(),
        "gradient_norm": student.grad.norm().item(),
    }


def pmd_loss(implementation, student, teacher, head, targets, top_k):
    from pmd.losses import distillation, fused
    from pmd.losses.distillation import TeacherPart

    token_terms = {"fused": fused.token_terms, "reference": distillation.token_terms}[implementation]
    terms = token_terms(student, head, targets, [TeacherPart(teacher, head, 1.0)], alpha=0.5, top_k=top_k)
    return terms.per_token_divergence.mean()


def trl_loss(student, teacher, head, targets, top_k):
    import torch
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    student_logits = student @ head.T
    with torch.no_grad():
        teacher_logits = teacher @ head.T
    per_token = compute_topk_self_distillation_loss(
        student_logits, teacher_logits, distillation_topk=top_k, distillation_alpha=0.5, distillation_add_tail=True
    )
    return per_token.mean()


def in_child(name: str, tokens: int, arguments: list[str]) -> dict[str, float | str | int]:
    command = [sys.executable, __file__, *arguments, "--child", name, str(tokens)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=["fused", "reference"], default="fused")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--trl-tokens", type=int, nargs="*", default=[2048], help="TRL needs about 4 MB per token")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], int(arguments.child[1]), arguments)))
        return
    table = Table(*COLUMNS, title=f"V={arguments.vocabulary}, H={arguments.hidden}, k={arguments.top_k}, float32")
    results = []
    for name, counts in (("trl", arguments.trl_tokens), (arguments.implementation, arguments.tokens)):
        for tokens in counts:
            row = in_child(name, tokens, sys.argv[1:])
            results.append(row)
            print(json.dumps(row), flush=True)
            table.add_row(*(f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS))
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
