"""Triton kernels for what happens to a chunk of logits between the products with the head.

Per chunk of logits [n, V], float32 arithmetic throughout:

    select     reads the student's logits twice: its top-k tokens, and the mass of all others
    absorb     reads logits once: the logits at given tokens, and the mass of all others
    gradient   reads logits once and writes the gradient over them, in the head's dtype

One program works on one row, in tiles. Mass is summed in lanes, one for each column of a tile, that are combined at the
end of the row: a tile costs neither a reduction nor a barrier, and a lane's running maximum keeps sums exact however
small they are.

The top-k are found without sorting. Each of the L lanes holds the largest of V / L logits; the k-th largest of these
maxima is a lower bound of the k-th largest logit, and few logits pass it: about -L log(1 - k / L), 103 for L = 2,048
and k = 100. In the second pass each lane notes the tiles in which it met one, and the best k of those are the support.
If too many pass (thousands of equal logits, or all large ones in few lanes), `_select_crowded` does the row over: it
numbers what passes, tile by tile, and where that is too much it searches for the k-th largest logit bit by bit, one
pass for each bit. Of equal logits at the end of the support, those of the lowest token ids belong to it.
"""

# pyright: reportCallIssue=false
# (Triton adds num_warps to a kernel's parameters)

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Maximum of no logits: finite, so that differences are not NaN.
LOWEST = tl.constexpr(-3.0e38)
SMALLEST_KEY = tl.constexpr(-(2**31))
#: exp(-200) is 0 in float32; the bound keeps -inf * 0 out of sums.
FAR_BELOW = tl.constexpr(-200.0)
#: Lower bits of a key that the threshold of the first pass leaves out: a few more logits pass, with fewer iterations.
COARSE_BITS = tl.constexpr(14)
#: Logits above the bound that a lane can note, and the bits that note one: 1 + the number of its tile.
NOTES = tl.constexpr(4)
NOTE_BITS = tl.constexpr(8)
NOTE_MASK = tl.constexpr(255)
MAX_TILES = 254


@dataclass(frozen=True, slots=True)
class Launch:
    """How kernels are launched; `benchmarks/gpu/loss.py` compares a few."""

    lanes: int = 4096  # columns of a tile
    warps: int = 8
    stages: int = 3  # tiles on their way from memory; above 1 they are copied to shared memory ahead of time
    select_lanes: int = 2048  # the same for `select`, which keeps more for each lane
    select_warps: int = 8
    select_stages: int = 1
    capacity: int = 1024  # logits of a crowded row that may pass the first threshold


@dataclass(frozen=True, slots=True)
class Rows:
    """One policy's logits, row by row: those of a few picked tokens, and three numbers that sum up all others."""

    ids: Tensor  # [n, K] int32, the picked tokens
    picked: Tensor  # [n, K] their logits
    maximum: Tensor  # [n] of the other tokens' logits x; LOWEST if there are none
    total: Tensor  # [n] sum of exp(x - maximum)
    moment: Tensor  # [n] sum of (x - maximum) exp(x - maximum)


def empty_rows(ids: Tensor) -> Rows:
    """Return rows that have absorbed nothing yet."""
    shape, float32 = ids.shape[:1], torch.float32
    new = ids.new_zeros
    return Rows(
        ids,
        torch.full_like(ids, -torch.inf, dtype=float32),
        new(shape, dtype=float32).fill_(LOWEST.value),
        new(shape, dtype=float32),
        new(shape, dtype=float32),
    )


def absorb(logits: Tensor, first: int, num_removed: int, scale: float, rows: Rows, launch: Launch) -> None:
    """Add logits [n, W] of the tokens from `first` on to `rows`.

    Args:
        num_removed: the first so many picked tokens do not count as others; their logits are overwritten.
        scale: factor of the logits, one over the temperature.
    """
    num_rows, width = logits.shape
    num_picks = rows.ids.shape[1]
    assert logits.stride(1) == 1
    _absorb[(num_rows,)](
        *(logits, logits.stride(0), width, first, rows.ids, rows.picked, num_picks, num_removed),
        *(rows.maximum, rows.total, rows.moment, scale),
        LANES=launch.lanes,
        STAGES=launch.stages,
        PICKS=_power_of_two(num_picks),
        REMOVES=num_removed > 0,
        num_warps=launch.warps,
    )


def select(logits: Tensor, targets: Tensor, top_k: int, scale: float, launch: Launch) -> Rows:
    """Return the rows of logits [n, V] with the top-k tokens picked, and after them the target.

    The target's logit also counts among the others, unless it is one of the top-k.
    """
    num_rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    ids = torch.empty(num_rows, top_k + 1, dtype=torch.int32, device=logits.device)
    ids[:, top_k] = targets
    rows = empty_rows(ids)
    candidates = torch.empty(num_rows, launch.capacity, dtype=torch.int32, device=logits.device)
    is_crowded = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    arguments = (
        *(logits, logits.stride(0), vocabulary, candidates, is_crowded, rows.ids, rows.picked, top_k),
        *(rows.maximum, rows.total, rows.moment, scale),
    )
    tiles = {"LANES": launch.select_lanes, "STAGES": launch.select_stages, "CAPACITY": launch.capacity}
    most = min(launch.capacity, _power_of_two(2 * top_k))
    _select[(num_rows,)](*arguments, **tiles, MOST=most, BLOCK=min(most, 32), num_warps=launch.select_warps)
    _select_crowded[(num_rows,)](*arguments, **tiles, num_warps=launch.select_warps)
    return rows


def can_select(top_k: int, vocabulary: int, launch: Launch) -> bool:
    """Whether `select` is made for so many tokens."""
    num_tiles = -(-vocabulary // launch.select_lanes)
    return 2 * top_k <= min(launch.select_lanes, launch.capacity) and num_tiles <= MAX_TILES


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient w.r.t. logits x: sum over terms of weight * exp(x - maximum - log_norm), except at picked tokens."""

    maximum: Tensor  # [n]
    terms: tuple[tuple[Tensor, Tensor], ...]  # one or two pairs (weight [n], log_norm [n])
    ids: Tensor  # [n, K] int32; the same token may be there twice, with the same value
    values: Tensor  # [n, K] the gradient there


def write_gradient(logits: Tensor, gradient: Gradient, scale: float, dtype: torch.dtype, launch: Launch) -> Tensor:
    """Write the gradient over logits [n, V], whose memory is no longer than that of `dtype`; return it [n, V].

    If `dtype` is shorter than the logits', row i of the result begins where row i of the logits began.
    """
    num_rows, vocabulary = logits.shape
    num_picks = gradient.ids.shape[1]
    assert logits.is_contiguous()
    out = logits if dtype == logits.dtype else logits.view(dtype)[:, :vocabulary]
    (first, first_norm), (second, second_norm) = gradient.terms[0], gradient.terms[-1]
    _gradient[(num_rows,)](
        *(logits, logits.stride(0), out, out.stride(0), vocabulary, scale, gradient.maximum),
        *(first, first_norm, second, second_norm, gradient.ids, gradient.values, num_picks),
        TWO_TERMS=len(gradient.terms) == 2,
        SHORTENS=dtype != logits.dtype,
        LANES=launch.lanes,
        STAGES=launch.stages,
        PICKS=_power_of_two(num_picks),
        num_warps=launch.warps,
    )
    return out


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@triton.jit
@no_type_check
def _key(x):
    """An int32 for a float32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
@no_type_check
def _add_to_lanes(x, maximum, total, moment):
    """Add one logit to each lane. -inf adds nothing, NaN stays NaN."""
    step = tl.maximum(x - maximum, FAR_BELOW, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp(-tl.abs(step))
    higher = step > 0
    moment = tl.where(higher, e * (moment - step * total), moment + step * e)
    total = tl.where(higher, e * total + 1.0, total + e)
    return tl.maximum(maximum, x), total, moment


@triton.jit
@no_type_check
def _combine_lanes(maximum, total, moment):
    """Return (maximum, total, moment) of all lanes together."""
    top = tl.max(maximum, 0)
    step = maximum - top
    e = tl.exp(step)
    return top, tl.sum(e * total, 0), tl.sum(e * (moment + step * total), 0)


@triton.jit
@no_type_check
def _combine(maximum, total, moment, other_maximum, other_total, other_moment):
    """Return (maximum, total, moment) of two disjoint sets of tokens."""
    top = tl.maximum(maximum, other_maximum)
    step, other_step = maximum - top, other_maximum - top
    e, other_e = tl.exp(step), tl.exp(other_step)
    moment = e * (moment + step * total) + other_e * (other_moment + other_step * other_total)
    return top, e * total + other_e * other_total, moment


@triton.jit
@no_type_check
def _absorb(
    logits, row_stride, width, first, ids, picked, num_picks, num_removed, maxima, totals, moments, scale,
    LANES: tl.constexpr, STAGES: tl.constexpr, PICKS: tl.constexpr, REMOVES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * row_stride
    slot = tl.arange(0, PICKS)
    pick = tl.load(ids + row * num_picks + slot, mask=slot < num_picks, other=-1) - first
    here = (pick >= 0) & (pick < width) & (slot < num_picks)
    logit = tl.load(x_row + pick, mask=here, other=0.0).to(tl.float32)
    tl.store(picked + row * num_picks + slot, logit * scale, mask=here)
    if REMOVES:
        tl.debug_barrier()  # every logit has been read
        tl.store(x_row + pick, float("-inf"), mask=here & (slot < num_removed))
        tl.debug_barrier()
    lane = tl.arange(0, LANES)
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, width, LANES, num_stages=STAGES):
        column = start + lane
        x = tl.load(x_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
        maximum, total, moment = _add_to_lanes(x * scale, maximum, total, moment)
    top, sums, sums_of_moments = _combine_lanes(maximum, total, moment)
    top, sums, sums_of_moments = _combine(
        top, sums, sums_of_moments, tl.load(maxima + row), tl.load(totals + row), tl.load(moments + row)
    )
    tl.store(maxima + row, top)
    tl.store(totals + row, sums)
    tl.store(moments + row, sums_of_moments)


@triton.jit
@no_type_check
def _count_at_least(x_row, vocabulary, bound, LANES: tl.constexpr):
    """Return how many logits of the row have a key of at least `bound`."""
    lane = tl.arange(0, LANES)
    counts = tl.zeros([LANES], tl.int32)
    for start in range(0, vocabulary, LANES):
        column = start + lane
        inside = column < vocabulary
        x = tl.load(x_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        counts += (inside & (_key(x) >= bound)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
@no_type_check
def _kth_key_of_row(x_row, vocabulary, k, LANES: tl.constexpr):
    """Return the k-th largest key of a whole row, reading it once for each bit."""
    kth = tl.where(_count_at_least(x_row, vocabulary, 0, LANES) >= k, 0, SMALLEST_KEY)
    for n in range(0, 31):
        trial = kth + (1 << (30 - n))
        kth = tl.where(_count_at_least(x_row, vocabulary, trial, LANES) >= k, trial, kth)
    return kth


@triton.jit
@no_type_check
def _kth_key(keys, k, num_bits):
    """Return the k-th largest of the keys, rounded down to the sign and the upper `num_bits` of the other 31 bits."""
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, 0, SMALLEST_KEY)
    for n in range(0, num_bits):
        trial = kth + (1 << (30 - n))
        kth = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, kth)
    return kth


@triton.jit
@no_type_check
def _collect(
    x_row, vocabulary, candidates, bound, num_equal, scale,
    ROUNDED: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Write the columns of the logits above the bound; return their number, and the lanes of all other logits.

    Those equal to it are above a ROUNDED bound; of an exact one, the first `num_equal` are.
    """
    lane = tl.arange(0, LANES)
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    count = tl.sum(tl.zeros([LANES], tl.int32), 0)
    equals = count
    for start in tl.range(0, vocabulary, LANES, num_stages=STAGES):
        column = start + lane
        inside = column < vocabulary
        x = tl.load(x_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        key = _key(x)
        if ROUNDED:
            above = inside & (key >= bound)
        else:
            equal = inside & (key == bound)
            rank = equals + tl.cumsum(equal.to(tl.int32), 0)
            above = inside & ((key > bound) | (equal & (rank <= num_equal)))
            equals += tl.sum(equal.to(tl.int32), 0)
        slot = count + tl.cumsum(above.to(tl.int32), 0) - 1
        tl.store(candidates + slot, column, mask=above & (slot < CAPACITY))
        count += tl.sum(above.to(tl.int32), 0)
        maximum, total, moment = _add_to_lanes(tl.where(above, float("-inf"), x * scale), maximum, total, moment)
    return count, maximum, total, moment


@triton.jit
@no_type_check
def _bound_of_row(x_row, vocabulary, k, LANES: tl.constexpr, STAGES: tl.constexpr):
    """Return a key that the k largest logits of a row reach, and few others: from the largest of each lane."""
    lane = tl.arange(0, LANES)
    largest = tl.full([LANES], float("-inf"), tl.float32)
    for start in tl.range(0, vocabulary, LANES, num_stages=STAGES):
        column = start + lane
        x = tl.load(x_row + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    return _kth_key(_key(largest), k, 31 - COARSE_BITS)


@triton.jit
@no_type_check
def _store_others(maximum_at, total_at, moment_at, top, sums, sums_of_moments, rest):
    """Store (maximum, total, moment) of a row's tokens that were not picked; `rest` are candidates among them."""
    rest_top = tl.maximum(tl.max(rest, 0), LOWEST)
    step = tl.maximum(rest - rest_top, FAR_BELOW)
    e = tl.exp(step)
    top, sums, sums_of_moments = _combine(top, sums, sums_of_moments, rest_top, tl.sum(e, 0), tl.sum(step * e, 0))
    tl.store(maximum_at, top)
    tl.store(total_at, sums)
    tl.store(moment_at, sums_of_moments)


@triton.jit
@no_type_check
def _select(
    logits, row_stride, vocabulary, candidates, is_crowded, ids, picked, k, maxima, totals, moments, scale,
    LANES: tl.constexpr, STAGES: tl.constexpr, CAPACITY: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, candidates = logits + row * row_stride, candidates + row * CAPACITY
    ids, picked = ids + row * (k + 1), picked + row * (k + 1)
    lane = tl.arange(0, LANES)
    bound = _bound_of_row(x_row, vocabulary, k, LANES, STAGES)
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    notes = tl.zeros([LANES], tl.int32)
    count = tl.zeros([LANES], tl.int32)
    for start in tl.range(0, vocabulary, LANES, num_stages=STAGES):
        place = start + lane
        inside = place < vocabulary
        x = tl.load(x_row + place, mask=inside, other=float("-inf")).to(tl.float32)
        above = inside & (_key(x) >= bound)
        notes = tl.where(above, (notes << NOTE_BITS) | (start // LANES + 1), notes)
        count += above.to(tl.int32)
        maximum, total, moment = _add_to_lanes(tl.where(above, float("-inf"), x * scale), maximum, total, moment)
    top, sums, sums_of_moments = _combine_lanes(maximum, total, moment)
    num_above = tl.sum(count, 0)
    fits = (num_above <= MOST) & (tl.max(count, 0) <= NOTES)
    tl.store(is_crowded + row, tl.where(fits, 0, 1))
    if fits:
        first = tl.cumsum(count, 0) - count
        for n in tl.static_range(NOTES):
            tile = ((notes >> (n * NOTE_BITS)) & NOTE_MASK) - 1
            tl.store(candidates + first + n, tile * LANES + lane, mask=count > n)
        tl.debug_barrier()  # the candidates are written
        slot = tl.arange(0, MOST)
        valid = slot < num_above
        column = tl.load(candidates + slot, mask=valid, other=0)
        logit = tl.load(x_row + column, mask=valid, other=float("-inf")).to(tl.float32)
        key = _key(logit)
        rank = tl.zeros([MOST], tl.int32)
        for other_first in range(0, MOST, BLOCK):
            other_slot = other_first + tl.arange(0, BLOCK)
            other_valid = other_slot < num_above
            other = tl.load(candidates + other_slot, mask=other_valid, other=0)
            other_key = _key(tl.load(x_row + other, mask=other_valid, other=float("-inf")).to(tl.float32))
            ahead = (other_key[None, :] > key[:, None]) | (
                (other_key[None, :] == key[:, None]) & (other[None, :] < column[:, None])
            )
            rank += tl.sum((ahead & other_valid[None, :]).to(tl.int32), 1)
        chosen = valid & (rank < k)
        tl.store(ids + rank, column, mask=chosen)
        tl.store(picked + rank, logit * scale, mask=chosen)
        tl.store(picked + k, tl.load(x_row + tl.load(ids + k)).to(tl.float32) * scale)

        rest = tl.where(valid & ~chosen, logit * scale, float("-inf"))
        _store_others(maxima + row, totals + row, moments + row, top, sums, sums_of_moments, rest)


@triton.jit
@no_type_check
def _select_crowded(
    logits, row_stride, vocabulary, candidates, is_crowded, ids, picked, k, maxima, totals, moments, scale,
    LANES: tl.constexpr, STAGES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, candidates = logits + row * row_stride, candidates + row * CAPACITY
    if tl.load(is_crowded + row) != 0:
        ids, picked = ids + row * (k + 1), picked + row * (k + 1)
        bound = _bound_of_row(x_row, vocabulary, k, LANES, STAGES)
        count, maximum, total, moment = _collect(
            x_row, vocabulary, candidates, bound, 0, scale, True, LANES, STAGES, CAPACITY
        )
        if count > CAPACITY:
            bound = _kth_key_of_row(x_row, vocabulary, k, LANES)
            num_equal = k - _count_at_least(x_row, vocabulary, bound + 1, LANES)
            count, maximum, total, moment = _collect(
                x_row, vocabulary, candidates, bound, num_equal, scale, False, LANES, STAGES, CAPACITY
            )
        tl.debug_barrier()  # the candidates are written
        top, sums, sums_of_moments = _combine_lanes(maximum, total, moment)

        slot = tl.arange(0, CAPACITY)
        candidate = slot < count
        column = tl.load(candidates + slot, mask=candidate, other=0)
        x = tl.load(x_row + column, mask=candidate, other=float("-inf")).to(tl.float32)
        key = _key(x)
        kth = _kth_key(tl.where(candidate, key, SMALLEST_KEY), k, 31)
        greater = candidate & (key > kth)
        equal = candidate & (key == kth)
        rank = tl.sum(greater.to(tl.int32), 0) + tl.cumsum(equal.to(tl.int32), 0)
        chosen = greater | (equal & (rank <= k))
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(ids + place, column, mask=chosen)
        tl.store(picked + place, x * scale, mask=chosen)
        tl.store(picked + k, tl.load(x_row + tl.load(ids + k)).to(tl.float32) * scale)

        rest = tl.where(candidate & ~chosen, x * scale, float("-inf"))
        _store_others(maxima + row, totals + row, moments + row, top, sums, sums_of_moments, rest)


@triton.jit
@no_type_check
def _gradient(
    logits, row_stride, out, out_stride, vocabulary, scale, maxima, first, first_norm, second, second_norm,
    ids, values, num_picks,
    TWO_TERMS: tl.constexpr, SHORTENS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, out_row = logits + row * row_stride, out + row * out_stride
    maximum = tl.load(maxima + row)
    weight, norm = tl.load(first + row), tl.load(first_norm + row)
    second_weight, second_log = tl.load(second + row), tl.load(second_norm + row)
    lane = tl.arange(0, LANES)
    for start in tl.range(0, vocabulary, LANES, num_stages=STAGES):
        column = start + lane
        inside = column < vocabulary
        x = tl.load(x_row + column, mask=inside, other=float("-inf")).to(tl.float32) * scale - maximum
        gradient = weight * tl.exp(x - norm)
        if TWO_TERMS:
            gradient += second_weight * tl.exp(x - second_log)
        if SHORTENS:
            tl.debug_barrier()  # tiles up to this one have been read, and only they are overwritten
        tl.store(out_row + column, (gradient * scale).to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    slot = tl.arange(0, PICKS)
    valid = slot < num_picks
    pick = tl.load(ids + row * num_picks + slot, mask=valid, other=0)
    value = tl.load(values + row * num_picks + slot, mask=valid, other=0.0) * scale
    tl.store(out_row + pick, value.to(out.dtype.element_ty), mask=valid)
