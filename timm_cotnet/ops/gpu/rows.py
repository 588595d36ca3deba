"""Triton kernels over rows of channels: batch norm in training, forward and backward. Imports Triton.

Tensors are channels-last and dense: a pixel is a row of C channels. A program has a tile of BLOCK_C channels and a run
of LENGTH pixels of one image, which it walks through BLOCK_P at a time. Sums over pixels are kept for each run, (B,
RUNS, sums, channels), and added up in a fixed order by the next kernel: no atomics. Where nothing is asked of each
image, all images are one. FOLD pixels of a block lie in one thread, which adds them up before threads do.
"""
import triton
import triton.language as tl

# sizes that only count: a kernel of their own for each would take longer to compile than it gains
COUNTS = ['B', 'P', 'H', 'W', 'X_H', 'X_W', 'LENGTH', 'RUNS', 'ROWS', 'DILATION', 'PARTS']
SIZES = [*COUNTS, 'C', 'A']


@triton.jit
def place(P, LENGTH, RUNS, C, BLOCK_C: tl.constexpr):
    """This program's run, its image (in 64 bits), first pixel and end, and its channels."""
    TILES = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    run = pid // TILES
    first = run % RUNS * LENGTH
    return run.to(tl.int64), (run // RUNS).to(tl.int64), first, tl.minimum(first + LENGTH, P), c


@triton.jit
def load(ptr, p, end, c, C, ACC: tl.constexpr):
    """Channels c of pixels p, (pixels, channels); zero where there are none."""
    mask = (p < end)[:, None] & (c < C)[None, :]
    return tl.load(ptr + p[:, None] * C + c[None, :], mask=mask, other=0).to(ACC)


@triton.jit
def store(ptr, x, p, end, c, C):
    mask = (p < end)[:, None] & (c < C)[None, :]
    tl.store(ptr + p[:, None] * C + c[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def row(ptr, c, C, ACC: tl.constexpr):
    """A number for each channel."""
    return tl.load(ptr + c, mask=c < C, other=0).to(ACC)


@triton.jit
def store_row(ptr, x, c, C):
    tl.store(ptr + c, x.to(ptr.dtype.element_ty), mask=c < C)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def fold(x, FOLD: tl.constexpr):
    """Sums of the pixels that lie in one thread."""
    return tl.sum(tl.reshape(x, (FOLD, x.shape[0] // FOLD, x.shape[1])), 0)


@triton.jit
def store_moments(moments_ptr, run, total, squares, center, count, c, C):
    """Mean and sum of squares around it from the sums of x - center and of its squares."""
    total = tl.sum(total, 0)
    mean = total / count
    store_row(moments_ptr + run * (2 * C), center + mean, c, C)
    store_row(moments_ptr + run * (2 * C) + C, tl.maximum(tl.sum(squares, 0) - total * mean, 0), c, C)


@triton.jit(do_not_specialize=COUNTS)
def moments_kernel(
        x_ptr, moments_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Mean of each channel and sum of squares around it, of every run: (B, RUNS, 2, C)."""
    C = PARTS * ALIGN
    run, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    x_ptr += b * P * C
    center = row(x_ptr + first.to(tl.int64) * C, c, C, ACC)  # squares around it do not cancel
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    squares = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x = tl.where((p < end)[:, None], load(x_ptr, p, end, c, C, ACC) - center[None, :], 0)
        total += fold(x, FOLD)
        squares += fold(x * x, FOLD)
    store_moments(moments_ptr, run, total, squares, center, end - first, c, C)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_kernel(
        moments_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, table_ptr,
        B, P, LENGTH, RUNS, C,
        EPS: tl.constexpr, MOMENTUM: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """From moments what a batch norm does to each channel, x * scale + shift, and without its weight and bias: (4, C).

    Updates the running statistics.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = B * RUNS
    count = B.to(ACC) * P.to(ACC)
    center = row(moments_ptr, c, C, ACC)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    squares = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        size = tl.where(r < rows, tl.minimum(LENGTH, P - r % RUNS * LENGTH), 0).to(ACC)[:, None]
        distance = load(moments_ptr, 2 * r, 2 * rows, c, C, ACC) - center[None, :]
        total += size * distance
        squares += load(moments_ptr, 2 * r + 1, 2 * rows, c, C, ACC) + size * distance * distance
    total = tl.sum(total, 0)
    mean = center + total / count
    var = tl.maximum(tl.sum(squares, 0) - total * (total / count), 0) / count
    x_scale = 1 / tl.sqrt(var + EPS)
    scale = x_scale * row(weight_ptr, c, C, ACC)
    store_row(table_ptr, scale, c, C)
    store_row(table_ptr + C, row(bias_ptr, c, C, ACC) - mean * scale, c, C)
    store_row(table_ptr + 2 * C, x_scale, c, C)
    store_row(table_ptr + 3 * C, -mean * x_scale, c, C)
    running = row(running_mean_ptr, c, C, ACC)
    store_row(running_mean_ptr, (1 - MOMENTUM) * running + MOMENTUM * mean, c, C)
    running = row(running_var_ptr, c, C, ACC)
    store_row(running_var_ptr, (1 - MOMENTUM) * running + MOMENTUM * (var * (count / (count - 1))), c, C)
    if tl.program_id(0) == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def running_norm_kernel(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, table_ptr,
        C: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """What a batch norm in evaluation does to each channel, x * scale + shift: (2, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = row(weight_ptr, c, C, ACC) / tl.sqrt(row(var_ptr, c, C, ACC) + EPS)
    store_row(table_ptr, scale, c, C)
    store_row(table_ptr + C, row(bias_ptr, c, C, ACC) - row(mean_ptr, c, C, ACC) * scale, c, C)


@triton.jit(do_not_specialize=COUNTS)
def norm_act_kernel(
        x_ptr, residual_ptr, table_ptr, out_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """act(x * scale + shift + residual)."""
    C = PARTS * ALIGN
    _, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    x_ptr += b * P * C
    residual_ptr += b * P * C
    out_ptr += b * P * C
    scale, shift = row(table_ptr, c, C, ACC)[None, :], row(table_ptr + C, c, C, ACC)[None, :]
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        z = load(x_ptr, p, end, c, C, ACC) * scale + shift
        if RESIDUAL:
            z += load(residual_ptr, p, end, c, C, ACC)
        if RELU:
            z = tl.where(z <= 0, 0, z)  # a NaN stays one
        store(out_ptr, z, p, end, c, C)


@triton.jit(do_not_specialize=COUNTS)
def grad_sums_kernel(
        grad_ptr, x_ptr, out_ptr, table_ptr, passed_ptr, sums_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, TABLE_ROWS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Sums of a norm's gradient, and of its product with the input normed without weight and bias: (B, RUNS, 2, C).

    With RELU the gradient is that of its output. Behind a sum with a RESIDUAL out tells where that was zero, and what
    of the gradient passes, that of the residual, is stored; else the norm's own output tells, which is made again.
    Tables are those of each image, of TABLE_ROWS rows, or of all if that is 0.
    """
    C = PARTS * ALIGN
    run, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    grad_ptr += b * P * C
    x_ptr += b * P * C
    out_ptr += b * P * C
    passed_ptr += b * P * C
    table_ptr += b * (TABLE_ROWS * C)
    x_scale, x_shift = row(table_ptr + 2 * C, c, C, ACC)[None, :], row(table_ptr + 3 * C, c, C, ACC)[None, :]
    scale = row(table_ptr, c, C, ACC)[None, :] if RELU and not RESIDUAL else 0
    shift = row(table_ptr + C, c, C, ACC)[None, :] if RELU and not RESIDUAL else 0
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    products = tl.zeros((BLOCK_P // FOLD, BLOCK_C), ACC)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        grad, x = load(grad_ptr, p, end, c, C, ACC), load(x_ptr, p, end, c, C, ACC)
        if RELU:
            if RESIDUAL:
                grad = tl.where(load(out_ptr, p, end, c, C, ACC) > 0, grad, 0)
                store(passed_ptr, grad, p, end, c, C)
            else:
                grad = tl.where(x * scale + shift > 0, grad, 0)
        total += fold(grad, FOLD)
        products += fold(grad * (x * x_scale + x_shift), FOLD)
    store_row(sums_ptr + run * (2 * C), tl.sum(total, 0), c, C)
    store_row(sums_ptr + run * (2 * C) + C, tl.sum(products, 0), c, C)


@triton.jit
def store_backward_factors(
        factors_ptr, weight_ptr, table_ptr, grad_bias, grad_weight, count, c, C, ACC: tl.constexpr):
    """What turns the gradient of a norm's output into that of its input, grad * f0 + x * f1 + f2, and behind that the
    gradients of its weight and bias: (5, C)."""
    x_scale, x_shift = row(table_ptr + 2 * C, c, C, ACC), row(table_ptr + 3 * C, c, C, ACC)
    of_grad = x_scale * row(weight_ptr, c, C, ACC)
    of_x = -of_grad * grad_weight / count
    store_row(factors_ptr, of_grad, c, C)
    store_row(factors_ptr + C, of_x * x_scale, c, C)
    store_row(factors_ptr + 2 * C, of_x * x_shift - of_grad * grad_bias / count, c, C)
    store_row(factors_ptr + 3 * C, grad_weight, c, C)
    store_row(factors_ptr + 4 * C, grad_bias, c, C)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_kernel(
        sums_ptr, weight_ptr, table_ptr, factors_ptr, B, P, ROWS, C,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """`store_backward_factors` from sums of all rows, (ROWS, 2, C), those of `grad_sums_kernel`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    products = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, ROWS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        total += load(sums_ptr, 2 * r, 2 * ROWS, c, C, ACC)
        products += load(sums_ptr, 2 * r + 1, 2 * ROWS, c, C, ACC)
    store_backward_factors(
        factors_ptr, weight_ptr, table_ptr, tl.sum(total, 0), tl.sum(products, 0),
        B.to(ACC) * P.to(ACC), c, C, ACC)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
        grad_ptr, x_ptr, table_ptr, factors_ptr, grad_x_ptr, P, LENGTH, RUNS, PARTS,
        ALIGN: tl.constexpr, FACTOR_ROWS: tl.constexpr, RELU: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):
    """Gradient of a norm's input from that of its output, or with RELU from that behind ReLU.

    Factors are those of each image, of FACTOR_ROWS rows, or of all if that is 0; the table, for RELU, is that of all.
    """
    C = PARTS * ALIGN
    _, b, first, end, c = place(P, LENGTH, RUNS, C, BLOCK_C)
    grad_ptr += b * P * C
    x_ptr += b * P * C
    grad_x_ptr += b * P * C
    factors_ptr += b * (FACTOR_ROWS * C)
    of_grad, of_x = row(factors_ptr, c, C, ACC)[None, :], row(factors_ptr + C, c, C, ACC)[None, :]
    rest = row(factors_ptr + 2 * C, c, C, ACC)[None, :]
    scale = row(table_ptr, c, C, ACC)[None, :] if RELU else 0
    shift = row(table_ptr + C, c, C, ACC)[None, :] if RELU else 0
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        grad, x = load(grad_ptr, p, end, c, C, ACC), load(x_ptr, p, end, c, C, ACC)
        if RELU:
            grad = tl.where(x * scale + shift > 0, grad, 0)
        store(grad_x_ptr, grad * of_grad + x * of_x + rest, p, end, c, C)


@triton.jit(do_not_specialize=COUNTS)
def avg_pool_kernel(
        x_ptr, out_ptr, H, W, X_H, X_W,
        C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
        PW: tl.constexpr, ADJOINT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """Mean of the KH * KW pixels of each window, zeros outside included; H, W are those of out, X_H, X_W those of x.

    With ADJOINT out is the gradient of what was pooled, and x that of the means.
    """
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    blocks = tl.cdiv(H * W, BLOCK_P)
    p = pid // TILES % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (pid // TILES // blocks).to(tl.int64)
    x_ptr += b * X_H * X_W * C
    out_ptr += b * H * W * C
    h, w = p // W, p % W
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for i in range(KH):
        for j in range(KW):
            if ADJOINT:  # the windows that see the pixel at their place (i, j)
                y, x = h + PH - i, w + PW - j
                inside = (y >= 0) & (y % SH == 0) & (x >= 0) & (x % SW == 0)
                y, x = y // SH, x // SW
            else:
                y, x = h * SH - PH + i, w * SW - PW + j
                inside = (y >= 0) & (x >= 0)
            inside = inside & (p < H * W) & (y < X_H) & (x < X_W)
            mask = inside[:, None] & (c < C)[None, :]
            total += tl.load(x_ptr + (y * X_W + x)[:, None] * C + c[None, :], mask=mask, other=0).to(ACC)
    store(out_ptr, total / (KH * KW), p, H * W, c, C)
