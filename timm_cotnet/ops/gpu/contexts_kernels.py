"""Triton kernels of filters and their application to the values; `contexts.py` launches them. Imports Triton.

As in `rows.py`, a pixel is a row of C channels, or of N = G * k * k filter values. Filters lie tap by tap: value n of
group slice s, tap t and filter g of the slice is `(s * k * k + t) * GS + g`, with GS filters in a slice, so that
neighbours in memory are neighbouring filters, as they are neighbouring channels: channel c of a slice uses filter
c % GS. A program walks through its pixels in order, so that the rows above and below are still in the cache.
"""
import triton
import triton.language as tl

from .rows import COUNTS, fold, load, sigmoid, store, store_moments, store_row


# Norm of the filters


@triton.jit(do_not_specialize=COUNTS)
def filter_norm_kernel(
        moments_ptr, conv_bias_ptr, weight_ptr, bias_ptr, table_ptr, means_ptr, P, LENGTH, RUNS,
        GROUPS: tl.constexpr, GS: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):
    """From moments what the group norm does to each filter value of an image, x * scale + shift, and without its weight
    and bias: (B, 4, N). The values are those of the convolution without its bias. And their means, (B, N), in the
    latter form."""
    N: tl.constexpr = GROUPS * TAPS * GS
    TILES: tl.constexpr = (GS + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    g = pid % TILES * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    s = pid // TILES % GROUPS
    b = (pid // (TILES * GROUPS)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)[:, None]
    inside = (t < TAPS) & (g < GS)
    n = (s * TAPS + t) * GS + g
    own = (s * GS + g) * TAPS + t  # where the modules have it
    conv_bias = tl.load(conv_bias_ptr + own, mask=inside, other=0).to(ACC)
    moments_ptr += b * RUNS * (2 * N)
    mean = tl.zeros((BLOCK_T, BLOCK_G), ACC)
    for run in range(RUNS):
        size = tl.minimum(LENGTH, P - run * LENGTH).to(ACC)
        mean += size * tl.load(moments_ptr + run * (2 * N) + n, mask=inside, other=0)
    mean = tl.where(inside, mean / P + conv_bias, 0)
    center = tl.sum(mean, 0, keep_dims=True) / TAPS
    squares = tl.zeros((BLOCK_T, BLOCK_G), ACC)
    for run in range(RUNS):
        size = tl.minimum(LENGTH, P - run * LENGTH).to(ACC)
        distance = tl.load(moments_ptr + run * (2 * N) + n, mask=inside, other=0) + conv_bias - center
        squares += tl.load(moments_ptr + run * (2 * N) + N + n, mask=inside, other=0) + size * distance * distance
    var = tl.sum(tl.where(inside, squares, 0), 0, keep_dims=True) / (P.to(ACC) * TAPS)
    x_scale = (1 / tl.sqrt(var + EPS)) + tl.zeros((BLOCK_T, BLOCK_G), ACC)
    x_shift = (conv_bias - center) * x_scale
    weight = tl.load(weight_ptr + own, mask=inside, other=0).to(ACC)
    bias = tl.load(bias_ptr + own, mask=inside, other=0).to(ACC)
    table_ptr += b * (4 * N)
    tl.store(table_ptr + n, x_scale * weight, mask=inside)
    tl.store(table_ptr + N + n, x_shift * weight + bias, mask=inside)
    tl.store(table_ptr + 2 * N + n, x_scale, mask=inside)
    tl.store(table_ptr + 3 * N + n, x_shift, mask=inside)
    tl.store(means_ptr + b * N + n, (mean - center) * x_scale, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def filter_norm_backward_kernel(
        sums_ptr, weight_ptr, table_ptr, means_ptr, factors_ptr, grads_ptr, P, RUNS,
        GROUPS: tl.constexpr, GS: tl.constexpr, TAPS: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):
    """What turns the gradient of the normed filters into that of the filters: (B, 3, N), see `norm_backward_kernel`.

    And of each image the gradients of the norm's weight and bias and of the convolution's bias, where the modules have
    them: (B, 3, N). Sums are (B, RUNS, 2, N), those of `grad_sums_kernel`.
    """
    N: tl.constexpr = GROUPS * TAPS * GS
    TILES: tl.constexpr = (GS + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    g = pid % TILES * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    s = pid // TILES % GROUPS
    b = (pid // (TILES * GROUPS)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)[:, None]
    inside = (t < TAPS) & (g < GS)
    n = (s * TAPS + t) * GS + g
    own = (s * GS + g) * TAPS + t
    total = tl.zeros((BLOCK_T, BLOCK_G), ACC)
    products = tl.zeros((BLOCK_T, BLOCK_G), ACC)
    for run in range(RUNS):
        at = sums_ptr + (b * RUNS + run) * (2 * N) + n
        total += tl.load(at, mask=inside, other=0)
        products += tl.load(at + N, mask=inside, other=0)
    weight = tl.load(weight_ptr + own, mask=inside, other=0).to(ACC)
    x_scale = tl.load(table_ptr + b * (4 * N) + 2 * N + n, mask=inside, other=0)
    x_shift = tl.load(table_ptr + b * (4 * N) + 3 * N + n, mask=inside, other=0)
    count = P.to(ACC) * TAPS
    mean_grad = tl.sum(total * weight, 0, keep_dims=True) / count
    mean_product = tl.sum(products * weight, 0, keep_dims=True) / count
    factors_ptr += b * (3 * N)
    tl.store(factors_ptr + n, weight * x_scale, mask=inside)
    tl.store(factors_ptr + N + n, -mean_product * x_scale * x_scale, mask=inside)
    tl.store(factors_ptr + 2 * N + n, -(mean_grad + mean_product * x_shift) * x_scale, mask=inside)
    grads_ptr += b * (3 * N)
    tl.store(grads_ptr + own, products, mask=inside)
    tl.store(grads_ptr + N + own, total, mask=inside)
    mean = tl.load(means_ptr + b * N + n, mask=inside, other=0)
    tl.store(grads_ptr + 2 * N + own, (total * weight - P * (mean_grad + mean * mean_product)) * x_scale, mask=inside)


# Local convolution


@triton.jit
def place_halves(
        P, LENGTH, RUNS, C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr,
        HALF: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """This program's run, its image (in 64 bits), first pixel and end, its channels, and the filter values of their
    first tap; channels that are none are C.

    It has BLOCK_C channels of the first HALF of a slice and as many of the second, which use the same filters: HALF is
    a multiple of GS. So a thread loads and norms a filter once for two channels.
    """
    CS: tl.constexpr = C // GROUPS
    TILES: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    w = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    s = pid // TILES % GROUPS
    run = pid // (TILES * GROUPS)
    first = run % RUNS * LENGTH
    c = tl.where(w < HALF, s * CS + w, C) if HALF % BLOCK_C else s * CS + w
    other = tl.where((w < HALF) & (w < CS - HALF), s * CS + HALF + w, C) if HALF % BLOCK_C or CS != 2 * HALF \
        else s * CS + HALF + w
    return (run.to(tl.int64), (run // RUNS).to(tl.int64), first, tl.minimum(first + LENGTH, P), c, other,
            s * (K * K * GS) + w % GS)


@triton.jit
def weighted_sums(
        x_ptr, logits_ptr, filter_table_ptr, p, end, c, other, n, H, W, DILATION,
        C: tl.constexpr, N: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr,
        ACC: tl.constexpr,
):
    """Local convolution at the pixels p by normed filters, for channels c and others, and the sums of the filters over
    the taps that lie in the image.

    With ADJOINT its transpose, which maps the gradient of the output to that of the input: it scatters where the
    convolution gathers, so what reaches a pixel comes from the other side, by the filters there. There are no sums.
    """
    h, w = p // W, p % W
    acc = tl.zeros((p.shape[0], c.shape[0]), ACC)
    others = tl.zeros((p.shape[0], c.shape[0]), ACC)
    total = tl.zeros((p.shape[0], c.shape[0]), ACC)
    for i in range(K):
        for j in tl.static_range(K):
            down, right = (i - K // 2) * DILATION, (j - K // 2) * DILATION
            if ADJOINT:
                down, right = -down, -right
            inside = (p < end) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
            q = p + down * W + right
            tap = n + (i * K + j) * GS
            at = q if ADJOINT else p
            filters = tl.load(logits_ptr + at[:, None] * N + tap[None, :], mask=inside[:, None], other=0).to(ACC)
            filters = filters * tl.load(filter_table_ptr + tap)[None, :] + tl.load(filter_table_ptr + N + tap)[None, :]
            x = tl.load(x_ptr + q[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0)
            acc += x.to(ACC) * filters
            x = tl.load(x_ptr + q[:, None] * C + other[None, :], mask=inside[:, None] & (other < C)[None, :], other=0)
            others += x.to(ACC) * filters
            if not ADJOINT:
                total += tl.where(inside[:, None], filters, 0)
    return acc, others, total


@triton.jit
def spread(ptr, p, c, C: tl.constexpr, ACC: tl.constexpr):
    """A number for each channel, loaded by the threads of all pixels: cheaper than to pass it around, or to keep it."""
    return tl.load(ptr + (0 * p[:, None] + c[None, :]), mask=(p >= 0)[:, None] & (c < C)[None, :], other=0).to(ACC)


@triton.jit
def normed(out, filters, table_ptr, p, c, C: tl.constexpr, ACC: tl.constexpr):
    """The local convolution of values whose norm table has: what its shift adds is the same for all of a filter."""
    return out * spread(table_ptr, p, c, C, ACC) + filters * spread(table_ptr + C, p, c, C, ACC)


@triton.jit(do_not_specialize=COUNTS)
def local_conv_kernel(
        value_ptr, logits_ptr, value_table_ptr, filter_table_ptr, out_ptr, moments_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Local convolution with the norms of values and filters, and the moments of its output."""
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, other, n = place_halves(P, LENGTH, RUNS, C, GROUPS, GS, K, HALF, BLOCK_C)
    value_ptr += b * P * C
    out_ptr += b * P * C
    logits_ptr += b * P * N
    filter_table_ptr += b * (4 * N)
    center = tl.zeros((BLOCK_C,), ACC)
    center1 = tl.zeros((BLOCK_C,), ACC)
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    total1 = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    squares = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    squares1 = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        out, out1, filters = weighted_sums(
            value_ptr, logits_ptr, filter_table_ptr, p, end, c, other, n, H, W, DILATION, C, N, GS, K, False, ACC)
        out = normed(out, filters, value_table_ptr, p, c, C, ACC)
        out1 = normed(out1, filters, value_table_ptr, p, other, C, ACC)
        store(out_ptr, out, p, end, c, C)
        store(out_ptr, out1, p, end, other, C)
        if start == first:  # squares around it do not cancel
            center = tl.sum(out, 0) / tl.minimum(end - first, BLOCK_P)
            center1 = tl.sum(out1, 0) / tl.minimum(end - first, BLOCK_P)
        out = tl.where((p < end)[:, None], out - center[None, :], 0)
        out1 = tl.where((p < end)[:, None], out1 - center1[None, :], 0)
        total += fold(out, FOLD)
        total1 += fold(out1, FOLD)
        squares += fold(out * out, FOLD)
        squares1 += fold(out1 * out1, FOLD)
    store_moments(moments_ptr, run, total, squares, center, end - first, c, C)
    store_moments(moments_ptr, run, total1, squares1, center1, end - first, other, C)


@triton.jit
def dynamic_context(out, filters, value_table_ptr, table_ptr, p, c, C: tl.constexpr, NORMED: tl.constexpr,
                    ACC: tl.constexpr):
    """The dynamic context of a local convolution, see `dynamic_context_kernel`."""
    if NORMED:
        z = normed(out, filters, value_table_ptr, p, c, C, ACC)
        z = normed(z, 1, table_ptr, p, c, C, ACC)
    else:
        z = out + spread(table_ptr, p, c, C, ACC)
    return z * sigmoid(z)


@triton.jit(do_not_specialize=COUNTS)
def dynamic_context_kernel(
        value_ptr, logits_ptr, static_ptr, value_table_ptr, filter_table_ptr, table_ptr, out_ptr, pooled_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
        NORMED: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """For inference: the dynamic context, and the sums of both contexts over each run, (B, RUNS, C).

    Tables hold scale and shift of the norms if NORMED; else values are normed, and table is what is added, (C).
    """
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, other, n = place_halves(P, LENGTH, RUNS, C, GROUPS, GS, K, HALF, BLOCK_C)
    value_ptr += b * P * C
    static_ptr += b * P * C
    out_ptr += b * P * C
    logits_ptr += b * P * N
    filter_table_ptr += b * (4 * N)
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    total1 = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        z, z1, filters = weighted_sums(
            value_ptr, logits_ptr, filter_table_ptr, p, end, c, other, n, H, W, DILATION, C, N, GS, K, False, ACC)
        z = dynamic_context(z, filters, value_table_ptr, table_ptr, p, c, C, NORMED, ACC)
        store(out_ptr, z, p, end, c, C)
        total += fold(tl.where((p < end)[:, None], z, 0) + load(static_ptr, p, end, c, C, ACC), FOLD)
        z1 = dynamic_context(z1, filters, value_table_ptr, table_ptr, p, other, C, NORMED, ACC)
        store(out_ptr, z1, p, end, other, C)
        total1 += fold(tl.where((p < end)[:, None], z1, 0) + load(static_ptr, p, end, other, C, ACC), FOLD)
    store_row(pooled_ptr + run * C, tl.sum(total, 0) / P, c, C)
    store_row(pooled_ptr + run * C, tl.sum(total1, 0) / P, other, C)


@triton.jit(do_not_specialize=COUNTS)
def value_grad_kernel(
        grad_ptr, logits_ptr, value_ptr, value_table_ptr, filter_table_ptr, out_ptr, sums_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Gradient of the normed values, and its sums, those of `grad_sums_kernel`."""
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, other, n = place_halves(P, LENGTH, RUNS, C, GROUPS, GS, K, HALF, BLOCK_C)
    grad_ptr += b * P * C
    value_ptr += b * P * C
    out_ptr += b * P * C
    logits_ptr += b * P * N
    filter_table_ptr += b * (4 * N)
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    total1 = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    products = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    products1 = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        grad, grad1, _ = weighted_sums(
            grad_ptr, logits_ptr, filter_table_ptr, p, end, c, other, n, H, W, DILATION, C, N, GS, K, True, ACC)
        store(out_ptr, grad, p, end, c, C)
        total += fold(grad, FOLD)
        products += fold(
            grad * normed(load(value_ptr, p, end, c, C, ACC), 1, value_table_ptr + 2 * C, p, c, C, ACC), FOLD)
        store(out_ptr, grad1, p, end, other, C)
        total1 += fold(grad1, FOLD)
        products1 += fold(
            grad1 * normed(load(value_ptr, p, end, other, C, ACC), 1, value_table_ptr + 2 * C, p, other, C, ACC), FOLD)
    sums_ptr += run * (2 * C)
    store_row(sums_ptr, tl.sum(total, 0), c, C)
    store_row(sums_ptr, tl.sum(total1, 0), other, C)
    store_row(sums_ptr + C, tl.sum(products, 0), c, C)
    store_row(sums_ptr + C, tl.sum(products1, 0), other, C)


@triton.jit(do_not_specialize=COUNTS)
def filter_grad_kernel(
        grad_ptr, value_ptr, value_table_ptr, out_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):
    """Gradient of the normed filters: of each tap the sum of grad times shifted normed value over a filter's channels.

    The axes are (pixel, m, g): channel `m * GS + g` of a slice uses filter g. Neighbouring threads have neighbouring
    channels, and each has two halves of the m, so that fewer threads have to add up.
    """
    CS: tl.constexpr = C // GROUPS
    TAPS: tl.constexpr = K * K
    N: tl.constexpr = GROUPS * GS * TAPS
    TILES: tl.constexpr = (GS + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    g = (pid % TILES * BLOCK_G + tl.arange(0, BLOCK_G))[None, None, :]
    s = pid // TILES % GROUPS
    run = pid // (TILES * GROUPS)
    b = (run // RUNS).to(tl.int64)
    first = run % RUNS * LENGTH
    end = tl.minimum(first + LENGTH, P)
    grad_ptr += b * P * C
    value_ptr += b * P * C
    out_ptr += b * P * N
    m = tl.arange(0, BLOCK_M)[None, :, None]
    c0 = s * CS + m * GS + g
    c1 = c0 + BLOCK_M * GS
    in0 = (m * GS < CS) & (g < GS)
    in1 = ((m + BLOCK_M) * GS < CS) & (g < GS)
    scale0 = tl.load(value_table_ptr + c0, mask=in0, other=0)
    scale1 = tl.load(value_table_ptr + c1, mask=in1, other=0)
    shift0 = tl.load(value_table_ptr + C + c0, mask=in0, other=0)
    shift1 = tl.load(value_table_ptr + C + c1, mask=in1, other=0)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None, None]
        h, w = p // W, p % W
        grad0 = tl.load(grad_ptr + p * C + c0, mask=(p < end) & in0, other=0).to(ACC)
        grad1 = tl.load(grad_ptr + p * C + c1, mask=(p < end) & in1, other=0).to(ACC)
        # a value is x * scale + shift: what the shift adds is the same at all taps inside the image
        of_shift = grad0 * shift0 + grad1 * shift1
        grad0 *= scale0
        grad1 *= scale1
        for t in range(TAPS):
            down, right = (t // K - K // 2) * DILATION, (t % K - K // 2) * DILATION
            inside = (p < end) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
            q = p + down * W + right
            x0 = tl.load(value_ptr + q * C + c0, mask=inside & in0, other=0).to(ACC)
            x1 = tl.load(value_ptr + q * C + c1, mask=inside & in1, other=0).to(ACC)
            out = tl.sum(tl.where(inside, of_shift, 0) + grad0 * x0 + grad1 * x1, 1, keep_dims=True)
            at = out_ptr + p * N + ((s * TAPS + t) * GS + g)
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(p < end) & (g < GS))
