"""Triton kernel of products of small matrices, those of the mixing; `contexts.py` launches it. Imports Triton."""
import triton
import triton.language as tl

SIZES = ['M', 'N', 'K', 'X_ROW', 'X_COLUMN', 'Y_ROW', 'Y_COLUMN', 'BIAS']


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
        x_ptr, y_ptr, bias_ptr, out_ptr, M, N, K, X_ROW, X_COLUMN, Y_ROW, Y_COLUMN, BIAS,
        BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    """x @ y^T, plus a bias if BIAS is 1, for x (M, K) and y (N, K) of these steps in memory: (M, N).

    Not in TF32. A program has BLOCK rows and as many columns.
    """
    TILES = (N + BLOCK - 1) // BLOCK
    m = tl.program_id(0) // TILES * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + n, mask=(n < N) & (BIAS == 1), other=0).to(ACC)
    out = tl.zeros((BLOCK, BLOCK), ACC) + bias[None, :]
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m[:, None] * X_ROW + k[None, :] * X_COLUMN,
                    mask=(m < M)[:, None] & (k < K)[None, :], other=0).to(ACC)
        y = tl.load(y_ptr + k[:, None] * Y_COLUMN + n[None, :] * Y_ROW,
                    mask=(k < K)[:, None] & (n < N)[None, :], other=0).to(ACC)
        if ACC == tl.float64:  # of which not all GPUs and versions have products of tiles
            out += tl.sum(x[:, :, None] * y[None, :, :], 1)
        else:
            out = tl.dot(x, y, out, input_precision='ieee')
    tl.store(out_ptr + m[:, None] * N + n[None, :], out.to(out_ptr.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])
