"""Triton kernels between the filters of a CoT layer as its modules have them and as they are used; imports Triton.

`matrices.py` launches them, and says what is made. Nothing is computed, and sizes are no constants: each is compiled
once for all layers of a network.
"""
import triton
import triton.language as tl

from .rows import load

SIZES = [
    'B', 'C', 'HIDDEN', 'N', 'GROUPS', 'TAPS', 'KEY_PART', 'KEY_GROUPS', 'KEY_TAPS', 'KEY_STEP', 'KEY_TAP_STEP',
    'OF_KEY', 'OF_FIRST', 'OF_ATTN', 'OF_VALUE']


@triton.jit
def place_of(n, ROWS, PART, GROUPS, TAPS, ROW_TAPS, STEP, TAP_STEP, FIRST):
    """Where the filters have element n of a matrix (out, taps of a row, channels) that does without groups, and whether
    they have it: PART channels of a group, STEP from one to the next from FIRST on, TAP_STEP from tap to tap.

    Rows of the matrix lie tap by tap, those of the filters filter by filter, if there are several TAPS.
    """
    channels = PART * GROUPS
    c, k, row = n % channels, n // channels % ROW_TAPS, n // (channels * ROW_TAPS)
    rows = ROWS // GROUPS
    group = row // rows
    filters = rows // TAPS
    row -= group * rows
    own = group * rows + row % filters * TAPS + row // filters
    c -= group * PART
    return own, FIRST + c * STEP + k * TAP_STEP, (c >= 0) & (c < PART)


@triton.jit
def copy(filters_ptr, matrix_ptr, own, mask, n, size, BACK: tl.constexpr, ACC: tl.constexpr):
    """From filters to a matrix, zero where there are none; if BACK from a matrix to filters."""
    if BACK:
        x = tl.load(matrix_ptr + n, mask=mask & (n < size), other=0).to(ACC)
        tl.store(filters_ptr + own, x.to(filters_ptr.dtype.element_ty), mask=mask & (n < size))
    else:
        x = tl.load(filters_ptr + own, mask=mask & (n < size), other=0).to(ACC)
        tl.store(matrix_ptr + n, x.to(matrix_ptr.dtype.element_ty), mask=n < size)


@triton.jit
def copy_all(
        pid, key_ptr, first_ptr, attn_ptr, value_ptr, key_matrix_ptr, of_query_ptr, of_key_ptr, attn_matrix_ptr,
        value_matrix_ptr, C, HIDDEN, N, GROUPS, TAPS, KEY_PART, KEY_GROUPS, KEY_TAPS, KEY_STEP, KEY_TAP_STEP,
        OF_KEY, OF_FIRST, OF_ATTN, OF_VALUE, BACK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    """`copy` of all filters; a program has BLOCK elements of a matrix. OF_KEY and so on are numbers of programs."""
    n = tl.arange(0, BLOCK)
    if pid < OF_KEY:
        n += pid * BLOCK
        row, at, inside = place_of(n, C, KEY_PART, KEY_GROUPS, 1, KEY_TAPS, KEY_STEP, KEY_TAP_STEP, 0)
        size = C * KEY_PART * KEY_GROUPS * KEY_TAPS
        copy(key_ptr, key_matrix_ptr, row * (KEY_PART * KEY_TAPS) + at, inside, n, size, BACK, ACC)
    elif pid < OF_KEY + 2 * OF_FIRST:
        pid -= OF_KEY
        half = pid // OF_FIRST
        n += pid % OF_FIRST * BLOCK
        part = C // GROUPS
        # channels of both halves one behind the other, or with groups in turn
        step = tl.where(GROUPS == 1, 1, 2)
        row, at, inside = place_of(n, HIDDEN, part, GROUPS, 1, 1, step, 0, half * tl.where(GROUPS == 1, part, 1))
        row = row * (2 * part) + at
        if half == 0:
            copy(first_ptr, of_query_ptr, row, inside, n, HIDDEN * C, BACK, ACC)
        else:
            copy(first_ptr, of_key_ptr, row, inside, n, HIDDEN * C, BACK, ACC)
    elif pid < OF_KEY + 2 * OF_FIRST + OF_ATTN:
        n += (pid - OF_KEY - 2 * OF_FIRST) * BLOCK
        part = HIDDEN // GROUPS
        row, at, inside = place_of(n, N, part, GROUPS, TAPS, 1, 1, 0, 0)
        copy(attn_ptr, attn_matrix_ptr, row * part + at, inside, n, N * HIDDEN, BACK, ACC)
    else:
        n += (pid - OF_KEY - 2 * OF_FIRST - OF_ATTN) * BLOCK
        part = C // GROUPS
        row, at, inside = place_of(n, C, part, GROUPS, 1, 1, 1, 0, 0)
        copy(value_ptr, value_matrix_ptr, row * part + at, inside, n, C * C, BACK, ACC)


@triton.jit(do_not_specialize=SIZES)
def to_matrices_kernel(
        key_ptr, first_ptr, attn_ptr, value_ptr, tracked_ptr, key_matrix_ptr, of_query_ptr, of_key_ptr, attn_matrix_ptr,
        value_matrix_ptr, C, HIDDEN, N, GROUPS, TAPS, KEY_PART, KEY_GROUPS, KEY_TAPS, KEY_STEP, KEY_TAP_STEP,
        OF_KEY, OF_FIRST, OF_ATTN, OF_VALUE, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    """All filters as matrices. And counts a batch of the norm that has no kernel here."""
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    copy_all(
        pid, key_ptr, first_ptr, attn_ptr, value_ptr, key_matrix_ptr, of_query_ptr, of_key_ptr, attn_matrix_ptr,
        value_matrix_ptr, C, HIDDEN, N, GROUPS, TAPS, KEY_PART, KEY_GROUPS, KEY_TAPS, KEY_STEP, KEY_TAP_STEP,
        OF_KEY, OF_FIRST, OF_ATTN, OF_VALUE, False, BLOCK, ACC)


@triton.jit(do_not_specialize=SIZES)
def from_matrices_kernel(
        key_ptr, first_ptr, attn_ptr, value_ptr, image_sums_ptr, sums_ptr, key_matrix_ptr, of_query_ptr, of_key_ptr,
        attn_matrix_ptr, value_matrix_ptr, B, C, HIDDEN, N, GROUPS, TAPS, KEY_PART, KEY_GROUPS, KEY_TAPS, KEY_STEP,
        KEY_TAP_STEP, OF_KEY, OF_FIRST, OF_ATTN, OF_VALUE,
        BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):
    """Gradients of the filters from those of the matrices. And sums over images: (B, 3 * N) -> (3 * N)."""
    copies = OF_KEY + 2 * OF_FIRST + OF_ATTN + OF_VALUE
    pid = tl.program_id(0)
    if pid < copies:
        copy_all(
            pid, key_ptr, first_ptr, attn_ptr, value_ptr, key_matrix_ptr, of_query_ptr, of_key_ptr, attn_matrix_ptr,
            value_matrix_ptr, C, HIDDEN, N, GROUPS, TAPS, KEY_PART, KEY_GROUPS, KEY_TAPS, KEY_STEP, KEY_TAP_STEP,
            OF_KEY, OF_FIRST, OF_ATTN, OF_VALUE, True, BLOCK, ACC)
    else:
        c = (pid - copies) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for start in range(0, B, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            total += load(image_sums_ptr, r, B, c, 3 * N, ACC)
        tl.store(sums_ptr + c, tl.sum(total, 0), mask=c < 3 * N)
