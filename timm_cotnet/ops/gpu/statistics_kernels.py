"""Triton kernel of the filters' norm in inference; `contexts.py` launches it. Imports Triton."""
import triton
import triton.language as tl

from .rows import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def filter_table_kernel(
        logits_ptr, conv_bias_ptr, weight_ptr, bias_ptr, table_ptr, P,
        GROUPS: tl.constexpr, GS: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):
    """The first two rows of what `filter_norm_kernel` makes, (B, 4, N), for images of which a program has all pixels.

    The axes are (pixel, tap, filter).
    """
    N: tl.constexpr = GROUPS * TAPS * GS
    TILES: tl.constexpr = (GS + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    g = (pid % TILES * BLOCK_G + tl.arange(0, BLOCK_G))[None, None, :]
    s = pid // TILES % GROUPS
    b = (pid // (TILES * GROUPS)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)[None, :, None]
    inside = (t < TAPS) & (g < GS)
    n = (s * TAPS + t) * GS + g
    own = (s * GS + g) * TAPS + t  # where the modules have it
    logits_ptr += b * P * N
    center = tl.load(logits_ptr + n, mask=inside, other=0).to(ACC)  # squares around it do not cancel
    total = tl.zeros((BLOCK_P, BLOCK_T, BLOCK_G), ACC)
    squares = tl.zeros((BLOCK_P, BLOCK_T, BLOCK_G), ACC)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None, None]
        x = tl.load(logits_ptr + p * N + n, mask=(p < P) & inside, other=0).to(ACC)
        x = tl.where(p < P, x - center, 0)
        total += x
        squares += x * x
    count = P.to(ACC)
    of_tap = tl.sum(total, 0, keep_dims=True)
    around = tl.maximum(tl.sum(squares, 0, keep_dims=True) - of_tap * (of_tap / count), 0)
    conv_bias = tl.load(conv_bias_ptr + own, mask=inside, other=0).to(ACC)
    mean = tl.where(inside, center + of_tap / count + conv_bias, 0)
    middle = tl.sum(mean, 1, keep_dims=True) / TAPS
    around = tl.where(inside, around + count * (mean - middle) * (mean - middle), 0)
    scale = 1 / tl.sqrt(tl.sum(around, 1, keep_dims=True) / (count * TAPS) + EPS)
    scale = scale * tl.load(weight_ptr + own, mask=inside, other=0).to(ACC)
    shift = (conv_bias - middle) * scale + tl.load(bias_ptr + own, mask=inside, other=0).to(ACC)
    table_ptr += b * (4 * N)
    tl.store(table_ptr + n, scale, mask=inside)
    tl.store(table_ptr + N + n, shift, mask=inside)
