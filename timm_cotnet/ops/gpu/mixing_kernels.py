"""Triton kernels of the two contexts' mix; `contexts.py` launches them. Imports Triton.

As in `rows.py`, a pixel is a row of C channels.
"""
import triton
import triton.language as tl

from .rows import COUNTS, SIZES, fold, load, place, row, sigmoid, store, store_backward_factors, store_row


@triton.jit
def load_static_weight(attn_ptr, c, mask, ACC: tl.constexpr, PAIRED: tl.constexpr = True):
    """Weight of the static context: softmax over the logits of dynamic and static, of each channel in turn.

    If not PAIRED, sigmoid of the difference of both, which is all that there is.
    """
    if PAIRED:
        of_dynamic = tl.load(attn_ptr + 2 * c, mask=mask, other=0).to(ACC)
        logit = tl.load(attn_ptr + 2 * c + 1, mask=mask, other=0).to(ACC) - of_dynamic
    else:
        logit = tl.load(attn_ptr + c, mask=mask, other=0).to(ACC)
    return sigmoid(logit)


@triton.jit(do_not_specialize=COUNTS)
def pool_kernel(
        out_ptr, static_ptr, table_ptr, pooled_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Sums of both contexts over each run, divided by the number of pixels: (B, RUNS, C)."""
    C = PARTS * ALIGN
    run, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    out_ptr += b * P * C
    static_ptr += b * P * C
    scale, shift = row(table_ptr, c, C, ACC)[None, :], row(table_ptr + C, c, C, ACC)[None, :]
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        z = load(out_ptr, p, end, c, C, ACC) * scale + shift
        total += fold(tl.where((p < end)[:, None], z * sigmoid(z), 0) + load(static_ptr, p, end, c, C, ACC), FOLD)
    store_row(pooled_ptr + run * C, tl.sum(total, 0) / P, c, C)


@triton.jit(do_not_specialize=COUNTS)
def mix_kernel(
        out_ptr, static_ptr, attn_ptr, table_ptr, mixed_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, DYNAMIC: tl.constexpr, PAIRED: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Mix of the contexts; out is the dynamic context if DYNAMIC, else the local convolution before its norm.

    attn has two logits for each channel if PAIRED, else one, see `load_static_weight`.
    """
    C = PARTS * ALIGN
    _, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    out_ptr += b * P * C
    static_ptr += b * P * C
    mixed_ptr += b * P * C
    attn_ptr += b * (2 * C if PAIRED else C)
    of_static = load_static_weight(attn_ptr, c, c < C, ACC, PAIRED)[None, :]
    scale = 0 if DYNAMIC else row(table_ptr, c, C, ACC)[None, :]
    shift = 0 if DYNAMIC else row(table_ptr + C, c, C, ACC)[None, :]
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        dynamic = load(out_ptr, p, end, c, C, ACC)
        if not DYNAMIC:
            dynamic = dynamic * scale + shift
            dynamic *= sigmoid(dynamic)
        static = load(static_ptr, p, end, c, C, ACC)
        store(mixed_ptr, dynamic * (1 - of_static) + static * of_static, p, end, c, C)


@triton.jit(do_not_specialize=COUNTS)
def attend_kernel(
        pooled_ptr, weight1_ptr, bias1_ptr, table_ptr, weight2_ptr, bias2_ptr, attn_ptr, RUNS, LENGTH,
        C: tl.constexpr, A: tl.constexpr, LOGITS: tl.constexpr, NORMED: tl.constexpr,
        BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """For inference: the logits of the mix, (B, LOGITS), from the sums of each run, (B, RUNS, C).

    Two matrix products with ReLU between them, and if NORMED a norm, of which table has scale and shift. A program has
    LENGTH logits of an image.
    """
    PARTS = (LOGITS + LENGTH - 1) // LENGTH
    b = (tl.program_id(0) // PARTS).to(tl.int64)
    a = tl.arange(0, BLOCK_A)
    in_hidden = a < A
    hidden = tl.load(bias1_ptr + a, mask=in_hidden, other=0).to(ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        pooled = tl.zeros((BLOCK_C,), ACC)
        for run in range(RUNS):
            pooled += row(pooled_ptr + (b * RUNS + run) * C, c, C, ACC)
        mask = in_hidden[:, None] & (c < C)[None, :]
        weight = tl.load(weight1_ptr + a[:, None] * C + c[None, :], mask=mask, other=0).to(ACC)
        hidden += tl.sum(weight * pooled[None, :], 1)
    if NORMED:
        hidden = hidden * tl.load(table_ptr + a, mask=in_hidden, other=0) \
            + tl.load(table_ptr + A + a, mask=in_hidden, other=0)
    hidden = tl.where((hidden <= 0) | (a >= A), 0, hidden)
    begin = tl.program_id(0) % PARTS * LENGTH
    for first in range(begin, begin + LENGTH, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < LOGITS)[:, None] & in_hidden[None, :]
        weight = tl.load(weight2_ptr + c[:, None] * A + a[None, :], mask=mask, other=0).to(ACC)
        attn = tl.sum(weight * hidden[None, :], 1) + row(bias2_ptr, c, LOGITS, ACC)
        tl.store(attn_ptr + b * LOGITS + c, attn, mask=c < LOGITS)


@triton.jit(do_not_specialize=SIZES)
def train_attend_kernel(
        run_sums_ptr, weight1_ptr, bias1_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        pooled_ptr, normed_ptr, hidden_ptr, x_scale_ptr, B, RUNS, C, A,
        EPS: tl.constexpr, MOMENTUM: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """In training what the second convolution of the mixing gets, (B, A), from sums of each run, (B, RUNS, C).

    A program has a hidden channel of all images. For the backward also the sums of each image, (B, C), and the norm's
    output without weight and bias, (B, A), and 1 / sqrt(var + eps), (A). Updates the running statistics.
    """
    a = tl.program_id(0)
    weight1_ptr += a * C
    bias1 = tl.load(bias1_ptr + a).to(ACC)
    total = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x = tl.zeros((BLOCK_R,), ACC) + bias1
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            pooled = tl.zeros((BLOCK_R, BLOCK_C), ACC)
            for run in range(RUNS):
                pooled += load(run_sums_ptr + run * C, r * RUNS, B * RUNS, c, C, ACC)
            if a == 0:
                store(pooled_ptr, pooled, r, B, c, C)
            x += tl.sum(pooled * row(weight1_ptr, c, C, ACC)[None, :], 1)
        tl.store(normed_ptr + r * A + a, x, mask=r < B)
        total += tl.where(r < B, x, 0)
    count = B.to(ACC)
    mean = tl.sum(total, 0) / count
    tl.debug_barrier()  # threads may read what others have written
    squares = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x = tl.load(normed_ptr + r * A + a, mask=r < B, other=0) - mean
        squares += tl.where(r < B, x * x, 0)
    var = tl.sum(squares, 0) / count
    x_scale = 1 / tl.sqrt(var + EPS)
    weight, bias = tl.load(weight_ptr + a).to(ACC), tl.load(bias_ptr + a).to(ACC)
    tl.debug_barrier()
    for start in range(0, B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x = (tl.load(normed_ptr + r * A + a, mask=r < B, other=0) - mean) * x_scale
        z = x * weight + bias
        z = tl.where(z <= 0, 0, z)
        tl.store(normed_ptr + r * A + a, x, mask=r < B)
        tl.store(hidden_ptr + r * A + a, z.to(hidden_ptr.dtype.element_ty), mask=r < B)
    tl.store(x_scale_ptr + a, x_scale)
    running = tl.load(running_mean_ptr + a).to(ACC)
    running = (1 - MOMENTUM) * running + MOMENTUM * mean
    tl.store(running_mean_ptr + a, running.to(running_mean_ptr.dtype.element_ty))
    running = tl.load(running_var_ptr + a).to(ACC)
    running = (1 - MOMENTUM) * running + MOMENTUM * (var * (count / (count - 1)))
    tl.store(running_var_ptr + a, running.to(running_var_ptr.dtype.element_ty))
    if a == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit(do_not_specialize=SIZES)
def train_attend_backward_kernel(
        grad_ptr, weight2_ptr, hidden_ptr, normed_ptr, weight_ptr, x_scale_ptr, grad_x_ptr, grads_ptr, B, C, A,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """Gradient of what the mixing's norm got, (B, A), from that of the logits, (B, 2 * C).

    And those of the norm's weight and bias, and of the first convolution's bias: (3, A).
    """
    a = tl.program_id(0)
    weight2_ptr += a
    total = tl.zeros((BLOCK_R,), ACC)
    products = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        grad = tl.zeros((BLOCK_R,), ACC)
        for first in range(0, 2 * C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            weight2 = tl.load(weight2_ptr + c * A, mask=c < 2 * C, other=0).to(ACC)
            grad += tl.sum(load(grad_ptr, r, B, c, 2 * C, ACC) * weight2[None, :], 1)
        at = r * A + a
        grad = tl.where(tl.load(hidden_ptr + at, mask=r < B, other=0).to(ACC) > 0, grad, 0)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=r < B)
        total += grad
        products += grad * tl.load(normed_ptr + at, mask=r < B, other=0)
    grad_bias, grad_weight, count = tl.sum(total, 0), tl.sum(products, 0), B.to(ACC)
    scale = tl.load(weight_ptr + a).to(ACC) * tl.load(x_scale_ptr + a)
    tl.debug_barrier()
    total = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = r * A + a
        grad = tl.load(grad_x_ptr + at, mask=r < B, other=0).to(ACC)
        normed = tl.load(normed_ptr + at, mask=r < B, other=0)
        grad = tl.where(r < B, scale * (grad - (grad_bias + normed * grad_weight) / count), 0)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=r < B)
        total += grad
    tl.store(grads_ptr + a, grad_weight)
    tl.store(grads_ptr + A + a, grad_bias)
    tl.store(grads_ptr + 2 * A + a, tl.sum(total, 0))


@triton.jit(do_not_specialize=COUNTS)
def mix_sums_kernel(
        grad_ptr, out_ptr, static_ptr, table_ptr, sums_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """All that the gradients of the mixing weights and of the norm need, though they need each other: (B, RUNS, 5, C).

    With z what the norm puts out, x that without weight and bias, and a' the derivative of SiLU at z, these are sums of
    grad * (static - silu(z)), grad * a', a', grad * a' * x and a' * x.
    """
    C = PARTS * ALIGN
    run, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    grad_ptr += b * P * C
    out_ptr += b * P * C
    static_ptr += b * P * C
    scale, shift = row(table_ptr, c, C, ACC)[None, :], row(table_ptr + C, c, C, ACC)[None, :]
    x_scale, x_shift = row(table_ptr + 2 * C, c, C, ACC)[None, :], row(table_ptr + 3 * C, c, C, ACC)[None, :]
    of_attn = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    grads = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    slopes = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    grads_x = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    slopes_x = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        grad, out = load(grad_ptr, p, end, c, C, ACC), load(out_ptr, p, end, c, C, ACC)
        z = out * scale + shift
        x = out * x_scale + x_shift
        y = sigmoid(z)
        slope = tl.where((p < end)[:, None], y * (1 + z * (1 - y)), 0)
        of_attn += fold(grad * (load(static_ptr, p, end, c, C, ACC) - z * y), FOLD)
        grads += fold(grad * slope, FOLD)
        slopes += fold(slope, FOLD)
        grads_x += fold(grad * slope * x, FOLD)
        slopes_x += fold(slope * x, FOLD)
    sums_ptr += run * (5 * C)
    store_row(sums_ptr, tl.sum(of_attn, 0), c, C)
    store_row(sums_ptr + C, tl.sum(grads, 0), c, C)
    store_row(sums_ptr + 2 * C, tl.sum(slopes, 0), c, C)
    store_row(sums_ptr + 3 * C, tl.sum(grads_x, 0), c, C)
    store_row(sums_ptr + 4 * C, tl.sum(slopes_x, 0), c, C)


@triton.jit(do_not_specialize=SIZES)
def attn_grad_kernel(
        run_sums_ptr, attn_ptr, sums_ptr, grad_attn_ptr, RUNS, C,
        BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """Sums of `mix_sums_kernel` over the runs, without the first: (B, 4, C). Of that the gradient of the mix's logits,
    (B, 2 * C)."""
    TILES = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (pid // TILES).to(tl.int64)
    run_sums_ptr += b * RUNS * (5 * C)
    sums_ptr += b * (4 * C)
    of_attn = tl.zeros((BLOCK_C,), ACC)
    for run in range(RUNS):
        of_attn += row(run_sums_ptr + run * (5 * C), c, C, ACC)
    for i in range(4):
        total = tl.zeros((BLOCK_C,), ACC)
        for run in range(RUNS):
            total += row(run_sums_ptr + run * (5 * C) + (i + 1) * C, c, C, ACC)
        store_row(sums_ptr + i * C, total, c, C)
    of_static = load_static_weight(attn_ptr + b * (2 * C), c, c < C, ACC)
    grad = of_attn * of_static * (1 - of_static)
    tl.store(grad_attn_ptr + b * (2 * C) + 2 * c, -grad, mask=c < C)
    tl.store(grad_attn_ptr + b * (2 * C) + 2 * c + 1, grad, mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def mixed_norm_backward_kernel(
        sums_ptr, attn_ptr, grad_attn_ptr, grad_pooled_ptr, weight_ptr, table_ptr, factors_ptr, B, P, C,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """`store_backward_factors` of the norm behind the local convolution, from sums (B, 4, C) of `attn_grad_kernel`.

    Behind these the gradient of what is added to the mix's logits, (2 * C).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    products = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    of_static = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < B)[:, None] & (c < C)[None, :]
        of_dynamic = 1 - load_static_weight(attn_ptr + r[:, None] * (2 * C), c[None, :], mask, ACC)
        of_static += tl.load(grad_attn_ptr + r[:, None] * (2 * C) + 2 * c[None, :] + 1, mask=mask, other=0).to(ACC)
        pool_grad = load(grad_pooled_ptr, r, B, c, C, ACC) / P
        total += of_dynamic * load(sums_ptr, 4 * r, 4 * B, c, C, ACC)
        total += pool_grad * load(sums_ptr, 4 * r + 1, 4 * B, c, C, ACC)
        products += of_dynamic * load(sums_ptr, 4 * r + 2, 4 * B, c, C, ACC)
        products += pool_grad * load(sums_ptr, 4 * r + 3, 4 * B, c, C, ACC)
    store_backward_factors(
        factors_ptr, weight_ptr, table_ptr, tl.sum(total, 0), tl.sum(products, 0),
        B.to(ACC) * P.to(ACC), c, C, ACC)
    of_static = tl.sum(of_static, 0)
    tl.store(factors_ptr + 5 * C + 2 * c, -of_static, mask=c < C)
    tl.store(factors_ptr + 5 * C + 2 * c + 1, of_static, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def mix_backward_kernel(
        grad_ptr, out_ptr, attn_ptr, grad_pooled_ptr, table_ptr, factors_ptr, grad_static_ptr, grad_out_ptr,
        P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Gradients of the static context and of the local convolution."""
    C = PARTS * ALIGN
    _, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    grad_ptr += b * P * C
    out_ptr += b * P * C
    grad_static_ptr += b * P * C
    grad_out_ptr += b * P * C
    of_static = load_static_weight(attn_ptr + b * (2 * C), c, c < C, ACC)[None, :]
    pool_grad = row(grad_pooled_ptr + b * C, c, C, ACC)[None, :] / P
    scale, shift = row(table_ptr, c, C, ACC)[None, :], row(table_ptr + C, c, C, ACC)[None, :]
    of_grad, of_x = row(factors_ptr, c, C, ACC)[None, :], row(factors_ptr + C, c, C, ACC)[None, :]
    rest = row(factors_ptr + 2 * C, c, C, ACC)[None, :]
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        grad, out = load(grad_ptr, p, end, c, C, ACC), load(out_ptr, p, end, c, C, ACC)
        store(grad_static_ptr, grad * of_static + pool_grad, p, end, c, C)
        z = out * scale + shift
        y = sigmoid(z)
        grad_z = (grad * (1 - of_static) + pool_grad) * (y * (1 + z * (1 - y)))
        store(grad_out_ptr, grad_z * of_grad + out * of_x + rest, p, end, c, C)
