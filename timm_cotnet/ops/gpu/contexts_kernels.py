"""Triton kernels of filters and their application to the values; `contexts.py` launches them. Imports Triton.

As in `rows.py`, a pixel is a row of C channels, or of N = G * k * k filter values. Filters lie tap by tap: value n of
group slice s, tap t and filter g of the slice is `(s * k * k + t) * GS + g`, with GS filters in a slice, so that
neighbours in memory are neighbouring filters, as they are neighbouring channels: channel c of a slice uses filter
c % GS. A program walks through its pixels in order, so that the rows above and below are still in the cache.
"""
import triton
import triton.language as tl

from .rows import COUNTS, sigmoid


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


import os
ONE_BY_ONE = tl.constexpr(os.environ.get('ONE') == '1')
# Local convolution


@triton.jit
def place_filters(
        P, LENGTH, RUNS,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """This program's run, its image (in 64 bits), first pixel and end, its channels, whether there are such, the
    filter values of their first tap, and whether there are such.

    The axes are (m, pixel, l, g): channel `(m * BLOCK_L + l) * GS + g` of a slice uses filter g. All m lie in one
    thread, which loads and norms a filter once for them; l in neighbours, as far as that fills a line of memory.
    """
    CS: tl.constexpr = C // GROUPS
    TILES_M: tl.constexpr = (CS // GS + BLOCK_M * BLOCK_L - 1) // (BLOCK_M * BLOCK_L)
    TILES_G: tl.constexpr = (GS + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    g = pid % TILES_G * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, None, :]
    m = pid // TILES_G % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None, None]
    l = tl.arange(0, BLOCK_L)[None, None, :, None]
    s = pid // (TILES_G * TILES_M) % GROUPS
    run = pid // (TILES_G * TILES_M * GROUPS)
    first = run % RUNS * LENGTH
    m = m * BLOCK_L + l
    return (run.to(tl.int64), (run // RUNS).to(tl.int64), first, tl.minimum(first + LENGTH, P),
            s * CS + m * GS + g, (m < CS // GS) & (g < GS), s * (K * K * GS) + g, g < GS)


@triton.jit
def of_channels(ptr, c, in_channels, p, ACC: tl.constexpr):
    """A number for each channel, for all pixels p, whose threads load it rather than pass it around."""
    c += tl.zeros(p.shape, tl.int32)
    return tl.load(ptr + c, mask=in_channels & (c >= 0), other=0).to(ACC)


@triton.jit
def of_pixels(ptr, p, end, c, in_channels, C: tl.constexpr, ACC: tl.constexpr):
    """Channels of pixels; zero where there are none."""
    return tl.load(ptr + (p * C + c), mask=(p < end) & in_channels, other=0).to(ACC)


@triton.jit
def store_pixels(ptr, x, p, end, c, in_channels, C: tl.constexpr):
    tl.store(ptr + (p * C + c), x.to(ptr.dtype.element_ty), mask=(p < end) & in_channels)


@triton.jit
def fold_pixels(x, FOLD: tl.constexpr):
    """Sums of the pixels that lie in one thread."""
    if FOLD == 1:
        return x
    return tl.sum(tl.reshape(x, (x.shape[0], FOLD, x.shape[1] // FOLD, x.shape[2], x.shape[3])), 1)


@triton.jit
def weighted_sum(
        x_ptr, logits_ptr, filter_table_ptr, p, end, c, in_channels, n, in_filters, H, W, DILATION,
        C: tl.constexpr, N: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, BLOCK_L: tl.constexpr,
        ADJOINT: tl.constexpr, ACC: tl.constexpr,
):
    """Local convolution at the pixels p by normed filters, and the sums of the filters over the taps in the image.

    With ADJOINT its transpose, which maps the gradient of the output to that of the input: it scatters where the
    convolution gathers, so what reaches a pixel comes from the other side, by the filters there.
    """
    h, w = p // W, p % W
    n += tl.zeros((1, 1, BLOCK_L, 1), tl.int32)  # neighbours load a filter as one access, rather than pass it around
    in_filters = in_filters & (n >= 0)
    acc = tl.zeros((c + p).shape, ACC)
    total = tl.zeros((n + p).shape, ACC)
    UNROLL: tl.constexpr = 1 if ONE_BY_ONE else K
    for i in range(K * K // UNROLL):
        for j in tl.static_range(UNROLL):
            t = i * UNROLL + j
            down, right = (t // K - K // 2) * DILATION, (t % K - K // 2) * DILATION
            if ADJOINT:
                down, right = -down, -right
            inside = (p < end) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
            q = p + (down * W + right)
            x = tl.load(x_ptr + (q * C + c), mask=inside & in_channels, other=0)
            tap = n + t * GS
            filters = tl.load(logits_ptr + ((q if ADJOINT else p) * N + tap), mask=inside & in_filters, other=0)
            scale = tl.load(filter_table_ptr + tap, mask=in_filters, other=0)
            filters = filters.to(ACC) * scale + tl.load(filter_table_ptr + N + tap, mask=in_filters, other=0)
            acc += x.to(ACC) * filters
            if not ADJOINT:
                total += tl.where(inside, filters, 0)
    return acc, total


@triton.jit(do_not_specialize=COUNTS)
def local_conv_kernel(
        value_ptr, logits_ptr, value_table_ptr, filter_table_ptr, out_ptr, moments_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
        FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Local convolution with the norms of values and filters, and the moments of its output."""
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, in_channels, n, in_filters = place_filters(
        P, LENGTH, RUNS, C, GROUPS, GS, K, BLOCK_M, BLOCK_L, BLOCK_G)
    value_ptr += b * P * C
    out_ptr += b * P * C
    logits_ptr += b * P * N
    filter_table_ptr += b * (4 * N)
    center = tl.zeros((BLOCK_M, 1, BLOCK_L, BLOCK_G), value_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK_M, BLOCK_P // FOLD, BLOCK_L, BLOCK_G), ACC)
    squares = tl.zeros((BLOCK_M, BLOCK_P // FOLD, BLOCK_L, BLOCK_G), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :, None, None]
        out, filters = weighted_sum(
            value_ptr, logits_ptr, filter_table_ptr, p, end, c, in_channels, n, in_filters,
            H, W, DILATION, C, N, GS, K, BLOCK_L, False, ACC)
        # the norm of the values: what its shift adds is the same for all channels of a filter
        out = out * of_channels(value_table_ptr, c, in_channels, p, ACC) \
            + filters * of_channels(value_table_ptr + C, c, in_channels, p, ACC)
        store_pixels(out_ptr, out, p, end, c, in_channels, C)
        if start == first:  # squares around it do not cancel
            center = (tl.sum(out, 1, keep_dims=True) / tl.minimum(end - first, BLOCK_P)).to(center.dtype)
        out = tl.where(p < end, out - center.to(ACC), 0)
        total += fold_pixels(out, FOLD)
        squares += fold_pixels(out * out, FOLD)
    total = tl.sum(total, 1, keep_dims=True)
    mean = total / (end - first)
    moments_ptr += run * (2 * C)
    tl.store(moments_ptr + c, center.to(ACC) + mean, mask=in_channels)
    squares = tl.maximum(tl.sum(squares, 1, keep_dims=True) - total * mean, 0)
    tl.store(moments_ptr + C + c, squares, mask=in_channels)


@triton.jit(do_not_specialize=COUNTS)
def dynamic_context_kernel(
        value_ptr, logits_ptr, static_ptr, value_table_ptr, filter_table_ptr, table_ptr, out_ptr, pooled_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, NORMED: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
        FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """For inference: the dynamic context, and the sums of both contexts over each run, (B, RUNS, C).

    Tables hold scale and shift of the norms if NORMED; else values are normed, and table is what is added, (C).
    """
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, in_channels, n, in_filters = place_filters(
        P, LENGTH, RUNS, C, GROUPS, GS, K, BLOCK_M, BLOCK_L, BLOCK_G)
    value_ptr += b * P * C
    static_ptr += b * P * C
    out_ptr += b * P * C
    logits_ptr += b * P * N
    filter_table_ptr += b * (4 * N)
    total = tl.zeros((BLOCK_M, BLOCK_P // FOLD, BLOCK_L, BLOCK_G), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :, None, None]
        z, filters = weighted_sum(
            value_ptr, logits_ptr, filter_table_ptr, p, end, c, in_channels, n, in_filters,
            H, W, DILATION, C, N, GS, K, BLOCK_L, False, ACC)
        if NORMED:
            z = z * of_channels(value_table_ptr, c, in_channels, p, ACC) \
                + filters * of_channels(value_table_ptr + C, c, in_channels, p, ACC)
            z = z * of_channels(table_ptr, c, in_channels, p, ACC) + of_channels(table_ptr + C, c, in_channels, p, ACC)
        else:
            z += of_channels(table_ptr, c, in_channels, p, ACC)
        z *= sigmoid(z)
        store_pixels(out_ptr, z, p, end, c, in_channels, C)
        static = of_pixels(static_ptr, p, end, c, in_channels, C, ACC)
        total += fold_pixels(tl.where(p < end, z, 0) + static, FOLD)
    tl.store(pooled_ptr + run * C + c, tl.sum(total, 1, keep_dims=True) / P, mask=in_channels)


@triton.jit(do_not_specialize=COUNTS)
def value_grad_kernel(
        grad_ptr, logits_ptr, value_ptr, value_table_ptr, filter_table_ptr, out_ptr, sums_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
        FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Gradient of the normed values, and its sums, those of `grad_sums_kernel`."""
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, in_channels, n, in_filters = place_filters(
        P, LENGTH, RUNS, C, GROUPS, GS, K, BLOCK_M, BLOCK_L, BLOCK_G)
    grad_ptr += b * P * C
    value_ptr += b * P * C
    out_ptr += b * P * C
    logits_ptr += b * P * N
    filter_table_ptr += b * (4 * N)
    total = tl.zeros((BLOCK_M, BLOCK_P // FOLD, BLOCK_L, BLOCK_G), ACC)
    products = tl.zeros((BLOCK_M, BLOCK_P // FOLD, BLOCK_L, BLOCK_G), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :, None, None]
        grad, _ = weighted_sum(
            grad_ptr, logits_ptr, filter_table_ptr, p, end, c, in_channels, n, in_filters,
            H, W, DILATION, C, N, GS, K, BLOCK_L, True, ACC)
        store_pixels(out_ptr, grad, p, end, c, in_channels, C)
        value = of_pixels(value_ptr, p, end, c, in_channels, C, ACC) \
            * of_channels(value_table_ptr + 2 * C, c, in_channels, p, ACC) \
            + of_channels(value_table_ptr + 3 * C, c, in_channels, p, ACC)
        total += fold_pixels(grad, FOLD)
        products += fold_pixels(grad * value, FOLD)
    sums_ptr += run * (2 * C)
    tl.store(sums_ptr + c, tl.sum(total, 1, keep_dims=True), mask=in_channels)
    tl.store(sums_ptr + C + c, tl.sum(products, 1, keep_dims=True), mask=in_channels)


@triton.jit(do_not_specialize=COUNTS)
def filter_grad_kernel(
        grad_ptr, value_ptr, value_table_ptr, out_ptr,
        P, H, W, LENGTH, RUNS, DILATION,
        C: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
        FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Gradient of the normed filters: of each tap the sum of grad times shifted normed value over a filter's channels.

    A program has all channels of its filters.
    """
    N: tl.constexpr = GROUPS * GS * K * K
    run, b, first, end, c, in_channels, n, in_filters = place_filters(
        P, LENGTH, RUNS, C, GROUPS, GS, K, BLOCK_M, BLOCK_L, BLOCK_G)
    grad_ptr += b * P * C
    value_ptr += b * P * C
    out_ptr += b * P * N
    is_first = tl.arange(0, BLOCK_L)[None, None, :, None] == 0
    n += tl.zeros((1, 1, BLOCK_L, 1), tl.int32)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :, None, None]
        h, w = p // W, p % W
        grad = of_pixels(grad_ptr, p, end, c, in_channels, C, ACC)
        # a value is x * scale + shift: what the shift adds is the same at all taps inside the image
        of_shift = tl.sum(grad * of_channels(value_table_ptr + C, c, in_channels, p, ACC), 0, keep_dims=True)
        grad *= of_channels(value_table_ptr, c, in_channels, p, ACC)
        for i in range(K):
            for j in tl.static_range(K):
                down, right = (i - K // 2) * DILATION, (j - K // 2) * DILATION
                inside = (p < end) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
                x = tl.load(value_ptr + ((p + (down * W + right)) * C + c), mask=inside & in_channels, other=0)
                out = tl.sum(grad * x.to(ACC), 0, keep_dims=True) + tl.where(inside, of_shift, 0)
                out = tl.sum(out, 2, keep_dims=True) + tl.zeros((1, 1, BLOCK_L, 1), ACC)
                at = out_ptr + (p * N + (n + (i * K + j) * GS))
                tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(p < end) & is_first & in_filters)
