"""The Triton kernels, run by Triton's interpreter on a CPU, against the reference implementation in float64.

The interpreter is slow, so shapes are tiny, and so are tiles, capacity and slabs: rows have several of each.
"""

import os
import subprocess
import sys

import pytest
import torch
from test_implementations import TOLERANCES, assert_equal, compute, draw_tensors

from pmd.losses import distillation
from pmd.losses.distillation import TeacherPart

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here; tests/gpu tests those", allow_module_level=True)

from pmd.losses import fused_triton
from pmd.losses.fused_triton import Plan
from pmd.losses.triton_kernels import Launch, absorb, empty_rows, select

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy meets inf and NaN
LAUNCH = Launch(lanes=16, select_lanes=16, capacity=16)
PLAN = Plan(slab_tokens=13, launch=LAUNCH)
SORTS = Plan(slab_tokens=13, launch=LAUNCH, sorts=True)
PRECISE = (1e-6, 1e-6)  # terms and gradients, relative to a tensor's largest value, or 1


def in_float64(tensors: dict) -> dict:
    """The same numbers, so that only the arithmetic differs."""
    wide = {name: tensors[name].double() for name in ("hidden", "head", "mix")}
    parts = [TeacherPart(part.hidden.double(), part.head.double(), part.weight) for part in tensors["teacher"]]
    return tensors | wide | {"teacher": parts}


def narrowed(result):
    """Round what was computed in float64 to float32."""
    terms, gradients = result
    single = [t if t is None else t.float() for t in (getattr(terms, name) for name in terms.__dataclass_fields__)]
    return distillation.TokenTerms(*single), [gradient.float() for gradient in gradients]


@pytest.mark.parametrize(
    ("parts", "alpha", "top_k", "tail", "temperature", "trains_head", "plan"),
    [
        (1, 0.5, 5, True, 1.0, False, PLAN),
        (1, 0.0, 8, True, 0.7, True, PLAN),
        (1, 1.0, 3, False, 1.0, False, PLAN),
        (2, "symmetric", 1, True, 1.0, True, PLAN),
        (2, 0.3, 4, False, 0.7, False, SORTS),
        (1, 0.5, 30, True, 1.0, True, PLAN),  # more than `select` is made for
        (0, 1.0, None, True, 0.7, False, PLAN),
        (0, 1.0, None, True, 1.0, True, PLAN),
    ],
)
def test_float32_is_as_good_as_the_reference_in_float64(parts, alpha, top_k, tail, temperature, trains_head, plan):
    tensors = draw_tensors(7, (3, 4, 37), parts, 1.0, torch.float32)
    tensors["mix"][:, 1] = 0.0  # a masked token
    options = {"alpha": alpha, "top_k": top_k, "tail": tail, "temperature": temperature, "chunk_tokens": 2}
    found = compute(fused_triton.token_terms, tensors, trains_head, plan=plan, **options)
    expected = narrowed(compute(distillation.token_terms, in_float64(tensors), trains_head, **options))
    assert_equal(found, expected, PRECISE)
    assert not found[1][0][1].any()


@pytest.mark.parametrize("trains_head", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_bfloat16_head_gives_the_references_numbers(trains_head):
    """The gradient is written into the first half of each row of float32 logits."""
    tensors = draw_tensors(3, (2, 6, 52), 1, 1.0, torch.bfloat16)
    one = compute(fused_triton.token_terms, tensors, trains_head, plan=PLAN, alpha=0.5, top_k=5)
    other = compute(distillation.token_terms, tensors, trains_head, alpha=0.5, top_k=5)
    assert_equal(one, other, TOLERANCES[torch.bfloat16])


def test_without_gradients_no_chunk_of_logits_exists():
    tensors = draw_tensors(2, (3, 3, 40), 0, 1.0, torch.float32)
    with torch.no_grad():
        found = fused_triton.token_terms(tensors["hidden"], tensors["head"], tensors["targets"], plan=PLAN)
        expected = distillation.token_terms(tensors["hidden"], tensors["head"], tensors["targets"])
    torch.testing.assert_close(found.student_logprobs, expected.student_logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-6, atol=1e-6)


def rows_of_logits() -> dict[str, torch.Tensor]:
    """Rows of 48 logits, 3 for each of 16 lanes, that are hard for a search for the top 6."""
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(48, generator=generator)
    one_lane = plain.clone()
    one_lane[3::16] += 50.0  # the top 3 in one lane
    three_lanes = plain - 100.0 * ~torch.isin(torch.arange(48) % 16, torch.tensor([1, 2, 9]))
    return {
        "plain": plain,
        "equal": torch.zeros(48),
        "two values": (plain > 0).float(),
        "ties": (plain * 2).round(),
        "one lane": one_lane,
        "three lanes": three_lanes,
        "few finite": torch.where(torch.arange(48) % 12 == 7, plain, -torch.inf),
        "negative": -plain.abs() - 1e-30,
        "tiny differences": 12.0 + plain * 1e-6,
        "far": 100.0 * plain,
        "signed zeros": torch.where(plain > 0.5, 0.0, -0.0),
    }


QUICK = ("plain", "two values", "one lane", "few finite", "tiny differences")


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(rows_of_logits()), marks=pytest.mark.slow)])
def test_the_top_k_are_exact_whatever_the_logits(names):
    named, k = {name: rows_of_logits()[name] for name in names}, 6
    logits = torch.stack(list(named.values()))
    targets = torch.arange(len(logits)) * 4
    rows = select(logits.clone(), targets, k, 1.0, LAUNCH)
    for row, name in enumerate(named):
        ids = rows.ids[row, :k].long()
        chosen, others = logits[row, ids], logits[row].clone()
        assert ids.unique().numel() == k, name
        assert chosen.sort().values.tolist() == logits[row].topk(k).values.sort().values.tolist(), name
        assert rows.picked[row].tolist() == [*chosen.tolist(), logits[row, targets[row]].item()], name
        ties = (logits[row] == chosen.min()).nonzero()[:, 0].tolist()
        taken = [i for i in ties if i in ids.tolist()]
        if name != "signed zeros":  # where -0 < 0
            assert taken == ties[: len(taken)], f"{name}: not the lowest ids"
        others[ids] = -torch.inf
        mass = rows.maximum[row].double() + rows.total[row].double().log()
        torch.testing.assert_close(mass, others.double().logsumexp(-1), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("sorts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_tail_beyond_float32_keeps_its_value_and_its_gradient(sorts):
    """The last tokens are 150 nats less likely than the first: their probabilities are 0 in float32."""
    hidden = torch.tensor([[1.0, 0.2], [0.9, -0.1]])
    head = torch.stack([torch.cat([torch.zeros(4), -torch.linspace(140, 150, 40)]), torch.linspace(-1, 1, 44)], 1)
    tensors = {
        "hidden": hidden,
        "head": head,
        "targets": torch.tensor([0, 30]),
        "teacher": [TeacherPart(hidden.flip(0) * 1.1, head)],
        "mix": torch.ones(2, 2),
    }
    plan = SORTS if sorts else PLAN
    for alpha in (0.0, 1.0):
        found = compute(fused_triton.token_terms, tensors, False, plan=plan, alpha=alpha, top_k=4)
        expected = narrowed(compute(distillation.token_terms, in_float64(tensors), False, alpha=alpha, top_k=4))
        assert_equal(found, expected, (1e-6, 1e-5))


def test_forbidden_tokens_have_no_mass_and_no_gradient():
    """As in a padded vocabulary: rows of -inf in the logits, through an infinite column of the head."""
    hidden = torch.tensor([[1.0, 0.5, 1.0], [0.5, 1.0, 1.0]])
    head = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    head[12:] = torch.tensor([0.0, 0.0, -torch.inf])
    targets, teacher = torch.tensor([0, 3]), [TeacherPart(hidden.flip(0), head)]
    found = fused_triton.token_terms(hidden, head, targets, teacher, alpha=0.5, top_k=7, plan=PLAN)
    wide, real = hidden.double(), head[:12].double()
    expected = distillation.token_terms(wide, real, targets, [TeacherPart(wide.flip(0), real)], alpha=0.5, top_k=7)
    for name in ("student_logprobs", "entropy", "per_token_divergence", "teacher_logprobs"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-6, atol=1e-6)
    student = torch.randn(2, 20)
    student[:, 12:] = -torch.inf
    rows = select(student.clone(), targets, 7, 1.0, LAUNCH)
    assert rows.maximum.isfinite().all()


def test_a_logit_that_is_not_a_number_is_not_lost():
    logits = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    logits[0, 20], logits[1, 0] = torch.nan, torch.inf
    rows = empty_rows(torch.tensor([[4], [4]], dtype=torch.int32))
    absorb(logits, 0, 0, 1.0, rows, LAUNCH)
    assert not (rows.maximum + rows.total + rows.moment).isfinite().any()
    rows = select(logits, torch.tensor([4, 4]), 3, 1.0, LAUNCH)
    assert not (rows.picked.sum(-1) + rows.maximum + rows.total + rows.moment).isfinite().any()


#: The interpreter accepts what the compiler refuses, such as a variable that changes its shape within a loop.
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pmd.losses import triton_kernels as kernels

POINTERS = {"logits": "*fp32", "out": "*bf16", "picked": "*fp32", "values": "*fp32", "first": "*fp32"}
POINTERS |= dict.fromkeys(("maxima", "totals", "moments", "first_norm", "second", "second_norm"), "*fp32")
POINTERS |= dict.fromkeys(("ids", "candidates", "is_crowded"), "*i32")
CONSTANTS = {"LANES": 2048, "STAGES": 1, "CAPACITY": 1024, "PICKS": 128, "MOST": 256, "BLOCK": 32}
for name in ("_absorb", "_select", "_select_crowded", "_gradient"):
    kernel = getattr(kernels, name)
    constants = {n: CONSTANTS.get(n, True) for n in kernel.arg_names if n.isupper()}
    types = {n: "constexpr" if n in constants else POINTERS.get(n, "fp32" if n == "scale" else "i32")
             for n in kernel.arg_names}
    if name == "_absorb":
        types["first"] = "i32"
    compiled = compile(ASTSource(kernel, types, {(kernel.arg_names.index(n),): v for n, v in constants.items()}),
                       GPUTarget("cuda", 90, 32), {"num_warps": 8})
    assert compiled.asm["cubin"], name
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """For a Hopper GPU, in a process without the interpreter; no GPU is needed."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
