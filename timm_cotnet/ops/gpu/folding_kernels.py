"""Triton kernels that fold batch norms into filters as a layer or a block is called; `folding.py` launches them.

What they read may have been changed in any way since the last call, so nothing is kept. Filters become rows (a row for
each output, its columns tap by tap) in one piece of memory, in which each part begins at a multiple of 64 elements.
"""
import triton
import triton.language as tl

from .rows import row, store_row


@triton.jit
def norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """Scale and shift of a batch norm in evaluation."""
    scale = row(weight_ptr, c, C, ACC) / tl.sqrt(row(var_ptr, c, C, ACC) + EPS)
    return scale, row(bias_ptr, c, C, ACC) - row(mean_ptr, c, C, ACC) * scale


@triton.jit
def fold_rows(
        weight_ptr, out_ptr, o, own, scale,
        ROWS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr,
        ROW: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):
    """Rows o are scale times the rows `own` of filters with groups, with zeros where an input is of another group.

    ROW, INPUT and TAP are the distances in memory of what is read.
    """
    COLUMNS: tl.constexpr = INPUTS * TAPS
    EACH: tl.constexpr = INPUTS // GROUPS
    for start in range(0, COLUMNS, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        i = j % INPUTS
        mask = (o < ROWS)[:, None] & (j < COLUMNS)[None, :]
        at = own[:, None] * ROW + (i % EACH * INPUT + j // INPUTS * TAP)[None, :]
        of_group = mask & ((i // EACH)[None, :] == (o // (ROWS // GROUPS))[:, None])
        x = tl.load(weight_ptr + at, mask=of_group, other=0).to(ACC) * scale[:, None]
        tl.store(out_ptr + o[:, None] * COLUMNS + j[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def filter_rows(
        attn_ptr, out_ptr, o,
        HIDDEN: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, TAPS: tl.constexpr,
        BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):
    """Rows of what makes the logits, tap by tap as `contexts_kernels.py` says, of rows that lie filter by filter."""
    own = (o // (TAPS * GS) * GS + o % GS) * TAPS + o // GS % TAPS
    EACH: tl.constexpr = HIDDEN // GROUPS
    fold_rows(attn_ptr, out_ptr, o, own, (o * 0 + 1).to(ACC), GROUPS * GS * TAPS, HIDDEN, 1, GROUPS, EACH, 1, 0,
              BLOCK_J, ACC)


@triton.jit
def order_filters_kernel(
        attn_ptr, out_ptr,
        HIDDEN: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr, TAPS: tl.constexpr,
        BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):
    """The convolution that makes the logits as a matrix, (N, HIDDEN)."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    filter_rows(attn_ptr, out_ptr, o, HIDDEN, GROUPS, GS, TAPS, BLOCK_J, ACC)


@triton.jit
def fold_layer_kernel(
        key_ptr, first_ptr, attn_ptr, value_ptr,
        key_mean_ptr, key_var_ptr, key_weight_ptr, key_bias_ptr,
        first_mean_ptr, first_var_ptr, first_weight_ptr, first_bias_ptr,
        value_mean_ptr, value_var_ptr, value_weight_ptr, value_bias_ptr,
        norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr,
        se_mean_ptr, se_var_ptr, se_weight_ptr, se_bias_ptr,
        out_ptr, table_ptr,
        C: tl.constexpr, HIDDEN: tl.constexpr, A: tl.constexpr, GROUPS: tl.constexpr, GS: tl.constexpr,
        TAPS: tl.constexpr, KEY_INPUTS: tl.constexpr, KEY_TAPS: tl.constexpr, KEY_GROUPS: tl.constexpr,
        KEY_INPUT: tl.constexpr, KEY_TAP: tl.constexpr,
        KEY: tl.constexpr, FIRST: tl.constexpr, VALUE: tl.constexpr, NORM: tl.constexpr, SE: tl.constexpr,
        BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):
    """All filters of a CoT layer, and the biases that its norms leave: those of keys, of hidden channels and of values.

    The table is what is added behind the local convolution, (C), and scale and shift of the mixing's norm, (2, A).
    KEY, FIRST, VALUE, NORM and SE are the eps of the norms.
    """
    N: tl.constexpr = GROUPS * GS * TAPS
    OF_C: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O  # programs
    OF_HIDDEN: tl.constexpr = (HIDDEN + BLOCK_O - 1) // BLOCK_O
    OF_N: tl.constexpr = (N + BLOCK_O - 1) // BLOCK_O
    QUERY: tl.constexpr = (C * KEY_INPUTS * KEY_TAPS + 63) // 64 * 64  # where it begins
    OF_KEY: tl.constexpr = QUERY + (HIDDEN * C + 63) // 64 * 64
    ATTN: tl.constexpr = OF_KEY + (HIDDEN * C + 63) // 64 * 64
    VALUES: tl.constexpr = ATTN + (N * HIDDEN + 63) // 64 * 64
    BIASES: tl.constexpr = VALUES + (C * C + 63) // 64 * 64
    ROUND_C: tl.constexpr = (C + 63) // 64 * 64
    EACH: tl.constexpr = C // GROUPS
    # query and key channels lie in turn if there are groups
    OF_STATIC: tl.constexpr = C if GROUPS == 1 else 1
    INPUT: tl.constexpr = 1 if GROUPS == 1 else 2
    pid = tl.program_id(0)
    rows = tl.arange(0, BLOCK_O)
    if pid < OF_C:
        o = pid * BLOCK_O + rows
        scale, shift = norm_of(key_mean_ptr, key_var_ptr, key_weight_ptr, key_bias_ptr, o, C, KEY, ACC)
        fold_rows(key_ptr, out_ptr, o, o, scale, C, KEY_INPUTS, KEY_TAPS, KEY_GROUPS,
                  KEY_INPUTS // KEY_GROUPS * KEY_TAPS, KEY_INPUT, KEY_TAP, BLOCK_J, ACC)
        store_row(out_ptr + BIASES, shift, o, C)
    elif pid < 2 * OF_C:
        o = (pid - OF_C) * BLOCK_O + rows
        scale, shift = norm_of(value_mean_ptr, value_var_ptr, value_weight_ptr, value_bias_ptr, o, C, VALUE, ACC)
        behind, added = norm_of(norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, o, C, NORM, ACC)
        fold_rows(value_ptr, out_ptr + VALUES, o, o, scale * behind, C, C, 1, GROUPS, EACH, 1, 0, BLOCK_J, ACC)
        store_row(out_ptr + BIASES + ROUND_C, shift * behind, o, C)
        store_row(table_ptr, added, o, C)
    elif pid < 2 * OF_C + OF_N:
        o = (pid - 2 * OF_C) * BLOCK_O + rows
        filter_rows(attn_ptr, out_ptr + ATTN, o, HIDDEN, GROUPS, GS, TAPS, BLOCK_J, ACC)
    elif pid < 2 * OF_C + OF_N + 2 * OF_HIDDEN:
        pid -= 2 * OF_C + OF_N
        of_static = pid // OF_HIDDEN
        o = pid % OF_HIDDEN * BLOCK_O + rows
        scale, shift = norm_of(
            first_mean_ptr, first_var_ptr, first_weight_ptr, first_bias_ptr, o, HIDDEN, FIRST, ACC)
        fold_rows(first_ptr + of_static * OF_STATIC, out_ptr + QUERY + of_static * (OF_KEY - QUERY), o, o, scale,
                  HIDDEN, C, 1, GROUPS, 2 * EACH, INPUT, 0, BLOCK_J, ACC)
        store_row(out_ptr + BIASES + 2 * ROUND_C, shift, o, HIDDEN)
    else:
        a = tl.arange(0, BLOCK_A)
        # names of their own, as one name has one shape
        se_scale, se_shift = norm_of(se_mean_ptr, se_var_ptr, se_weight_ptr, se_bias_ptr, a, A, SE, ACC)
        store_row(table_ptr + ROUND_C, se_scale, a, A)
        store_row(table_ptr + ROUND_C + A, se_shift, a, A)


@triton.jit
def fold_block_kernel(
        conv1_ptr, mean1_ptr, var1_ptr, weight1_ptr, bias1_ptr,
        conv3_ptr, mean3_ptr, var3_ptr, weight3_ptr, bias3_ptr,
        shortcut_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, out_ptr,
        INPUTS: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
        SHORTCUT: tl.constexpr,  # whether there is a convolution in it
        EPS1: tl.constexpr, EPS3: tl.constexpr, EPS: tl.constexpr,
        BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):
    """Filters of a bottleneck's 1x1 convolutions: (WIDTH, INPUTS), (OUTPUTS, HIDDEN) and (OUTPUTS, INPUTS).

    Behind them the bias of the first, and that of the other two together.
    """
    OF_WIDTH: tl.constexpr = (WIDTH + BLOCK_O - 1) // BLOCK_O
    CONV3: tl.constexpr = (WIDTH * INPUTS + 63) // 64 * 64
    OF_SHORTCUT: tl.constexpr = CONV3 + (OUTPUTS * HIDDEN + 63) // 64 * 64
    BIAS1: tl.constexpr = OF_SHORTCUT + ((OUTPUTS * INPUTS + 63) // 64 * 64 if SHORTCUT else 0)
    BIAS3: tl.constexpr = BIAS1 + (WIDTH + 63) // 64 * 64
    pid = tl.program_id(0)
    if pid < OF_WIDTH:
        o = pid * BLOCK_O + tl.arange(0, BLOCK_O)
        scale, shift = norm_of(mean1_ptr, var1_ptr, weight1_ptr, bias1_ptr, o, WIDTH, EPS1, ACC)
        fold_rows(conv1_ptr, out_ptr, o, o, scale, WIDTH, INPUTS, 1, 1, INPUTS, 1, 0, BLOCK_J, ACC)
        store_row(out_ptr + BIAS1, shift, o, WIDTH)
    else:
        o = (pid - OF_WIDTH) * BLOCK_O + tl.arange(0, BLOCK_O)
        scale, shift = norm_of(mean3_ptr, var3_ptr, weight3_ptr, bias3_ptr, o, OUTPUTS, EPS3, ACC)
        fold_rows(conv3_ptr, out_ptr + CONV3, o, o, scale, OUTPUTS, HIDDEN, 1, 1, HIDDEN, 1, 0, BLOCK_J, ACC)
        if SHORTCUT:
            scale, added = norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, o, OUTPUTS, EPS, ACC)
            fold_rows(shortcut_ptr, out_ptr + OF_SHORTCUT, o, o, scale, OUTPUTS, INPUTS, 1, 1, INPUTS, 1, 0,
                      BLOCK_J, ACC)
            shift += added
        store_row(out_ptr + BIAS3, shift, o, OUTPUTS)
