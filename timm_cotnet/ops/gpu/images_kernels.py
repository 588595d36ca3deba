"""Triton kernel between the two memory formats; `images.py` launches it. Imports Triton."""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['ROWS', 'COLUMNS'])
def transpose_kernel(
        x_ptr, out_ptr, ROWS, COLUMNS,
        ALIGN_ROWS: tl.constexpr, ALIGN_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Images of (rows, columns), all dense, to (columns, rows); ROWS and COLUMNS are those divided by ALIGN_..."""
    rows, columns = ROWS * ALIGN_ROWS, COLUMNS * ALIGN_COLUMNS
    tiles_r, tiles_c = (rows + BLOCK - 1) // BLOCK, (columns + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    c = pid % tiles_c * BLOCK + tl.arange(0, BLOCK)
    r = pid // tiles_c % tiles_r * BLOCK + tl.arange(0, BLOCK)
    b = (pid // (tiles_c * tiles_r)).to(tl.int64)
    x_ptr += b * rows * columns
    out_ptr += b * rows * columns
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask)
    tl.store(out_ptr + r[:, None] + c[None, :] * rows, x, mask=mask)
