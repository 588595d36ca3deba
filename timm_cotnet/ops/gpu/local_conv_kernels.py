"""Triton kernels of local convolution for CUDA and ROCm; `local_conv.py` launches them. Imports Triton.

A program owns a tile of BLOCK_H x BLOCK_W pixels by BLOCK_M x BLOCK_G channels. Channel c = m * G + g uses filter g, so
a filter value is loaded once for the BLOCK_M channels that share it. Every output element is written by one program,
which adds up in a fixed order: no atomics. Strides are general. Those of all axes but the channels come divided by
their common factor (ALIGN): the product tells the compiler how far addresses are aligned, and so how wide its loads may
be.
"""
import inspect
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a sum over values of dtype is kept."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# what is timed with TIMM_COTNET_AUTOTUNE=1; FILTERS is the number of filters in a tile
WEIGHTED_SUM_CONFIGS = (
    triton.Config({'FILTERS': 512, 'M_AXIS': 0}, num_warps=4, num_stages=1),
    triton.Config({'FILTERS': 512, 'M_AXIS': 1}, num_warps=4, num_stages=1),
    triton.Config({'FILTERS': 1024, 'M_AXIS': 0}, num_warps=4, num_stages=1),
    triton.Config({'FILTERS': 2048, 'M_AXIS': 0}, num_warps=8, num_stages=1),
)
WEIGHT_GRAD_CONFIGS = (
    triton.Config({'FILTERS': 512}, num_warps=4, num_stages=1),
    triton.Config({'FILTERS': 1024}, num_warps=4, num_stages=1),
    triton.Config({'FILTERS': 2048}, num_warps=8, num_stages=1),
)
AUTOTUNE = os.environ.get('TIMM_COTNET_AUTOTUNE') == '1' and not INTERPRETED  # nothing to time there


def _without_timing_in_a_capture(configs, named_args, **kwargs):
    """Timing synchronizes, which a CUDA graph that is being captured forbids."""
    return configs[:1] if torch.cuda.is_current_stream_capturing() else configs


def _tuned(*configs: triton.Config):
    """What timing chose on an H200 at all sizes of the networks; with TIMM_COTNET_AUTOTUNE=1 what it chooses here."""
    if not AUTOTUNE:
        values = {'FILTERS': lambda args: 512}
        if 'M_AXIS' in configs[0].kwargs:  # where the filters of a pixel fill half a line of 128 bytes
            values['M_AXIS'] = lambda args: int(args['BLOCK_G'] >= 32)
        return triton.heuristics(values)
    cache = {'cache_results': True} if 'cache_results' in inspect.signature(triton.autotune).parameters else {}
    return triton.autotune(
        configs=list(configs),
        key=['PIXELS', 'M', 'G', 'K', 'BLOCK_G', 'ALIGN_A', 'ALIGN_B'],
        prune_configs_by={'early_config_prune': _without_timing_in_a_capture},
        **cache,
    )


@triton.jit
def _place(
        H,
        W,
        G: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_G: tl.constexpr,
        M_AXIS: tl.constexpr,
        SKEW: tl.constexpr,
        WIDE: tl.constexpr,
):
    """This program's image (in 64 bits, it may be far away) and the rows, columns, m and g of its tile on three axes.

    The axes are (m, pixel, g) for M_AXIS = 0, which gives a thread all channels of its filter, and (pixel, m, g) for
    M_AXIS = 1, which gives them to neighbouring threads. With SKEW, threads of M_AXIS = 0 take their channels in
    different orders: where the g of one m fill only a part of a 128-byte line, the others would all ask for that part
    of their lines, one after the other. Offsets inside an image are in 64 bits if WIDE.
    """
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles_h = tl.cdiv(H, BLOCK_H)
    tiles_g = tl.cdiv(G, BLOCK_G)
    pid = tl.program_id(0)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    w = pid % tiles_w * BLOCK_W + pixel % BLOCK_W
    pid = pid // tiles_w
    h = pid % tiles_h * BLOCK_H + pixel // BLOCK_W
    pid = pid // tiles_h
    g = pid % tiles_g * BLOCK_G + tl.arange(0, BLOCK_G)
    b = (pid // tiles_g).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    if WIDE:
        h, w, m, g = h.to(tl.int64), w.to(tl.int64), m.to(tl.int64), g.to(tl.int64)
    if M_AXIS == 0:
        m = m[:, None, None]
        if SKEW:
            m = (m + pixel[None, :, None]) % BLOCK_M
        return b, h[None, :, None], w[None, :, None], m, g[None, None, :]
    else:
        return b, h[:, None, None], w[:, None, None], m[None, :, None], g[None, None, :]


@_tuned(*WEIGHTED_SUM_CONFIGS)
@triton.jit
def weighted_sum_kernel(
        x_ptr, weight_ptr, out_ptr,
        x_b, x_c, x_h, x_w,
        weight_b, weight_g, weight_t, weight_h, weight_w,
        out_b, out_c, out_h, out_w,
        H, W, DILATION,
        M: tl.constexpr,
        G: tl.constexpr,
        K: tl.constexpr,
        ADJOINT: tl.constexpr,
        PIXELS: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_G: tl.constexpr,
        SKEW: tl.constexpr,
        ALIGN_A: tl.constexpr,
        ALIGN_B: tl.constexpr,
        ALIGN_OUT: tl.constexpr,
        WIDE: tl.constexpr,
        ACC: tl.constexpr,
        FILTERS: tl.constexpr,
        M_AXIS: tl.constexpr,
):
    """Local convolution; with ADJOINT its transpose, which maps the gradient of the output to that of the input."""
    BLOCK_H: tl.constexpr = max(1, FILTERS // (BLOCK_G * BLOCK_W))
    b, h, w, m, g = _place(H, W, G, BLOCK_H, BLOCK_W, BLOCK_M, BLOCK_G, M_AXIS, SKEW, WIDE)
    x_ptr += b * (x_b * ALIGN_A)
    weight_ptr += b * (weight_b * ALIGN_B)
    out_ptr += b * (out_b * ALIGN_OUT)
    in_image = (h < H) & (w < W)
    for m0 in range(0, M, BLOCK_M):
        in_channels = (m0 + m < M) & (g < G)
        c = (m0 + m) * G + g
        acc = tl.zeros((c + h).shape, ACC)
        for i in range(K):
            for j in tl.static_range(K):
                # the transpose scatters where the convolution gathers: what reaches a pixel comes from the other side
                tap_h = h + ((K // 2 - i) if ADJOINT else (i - K // 2)) * DILATION
                tap_w = w + ((K // 2 - j) if ADJOINT else (j - K // 2)) * DILATION
                in_tap = (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
                x_at = tap_h * (x_h * ALIGN_A) + tap_w * (x_w * ALIGN_A) + c * x_c
                x = tl.load(x_ptr + x_at, mask=in_tap & in_channels, other=0)
                filter_h, filter_w, in_filter = (tap_h, tap_w, in_tap) if ADJOINT else (h, w, in_image)
                filter_at = filter_h * (weight_h * ALIGN_B) + filter_w * (weight_w * ALIGN_B) + g * weight_g
                filter_at += (i * K + j) * (weight_t * ALIGN_B)
                in_filter = in_filter & (g < G)
                if M_AXIS == 1:  # the threads of all m load it, as one access, rather than pass it around
                    filter_at, in_filter = tl.broadcast_to(filter_at, acc.shape), tl.broadcast_to(in_filter, acc.shape)
                filters = tl.load(weight_ptr + filter_at, mask=in_filter, other=0)
                acc += x.to(ACC) * filters.to(ACC)
        out_at = h * (out_h * ALIGN_OUT) + w * (out_w * ALIGN_OUT) + c * out_c
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=in_image & in_channels)


@_tuned(*WEIGHT_GRAD_CONFIGS)
@triton.jit
def weight_grad_kernel(
        grad_ptr, x_ptr, out_ptr,
        grad_b, grad_c, grad_h, grad_w,
        x_b, x_c, x_h, x_w,
        out_b, out_g, out_t, out_h, out_w,
        H, W, DILATION,
        M: tl.constexpr,
        G: tl.constexpr,
        K: tl.constexpr,
        PIXELS: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_G: tl.constexpr,
        SKEW: tl.constexpr,
        ALIGN_A: tl.constexpr,
        ALIGN_B: tl.constexpr,
        ALIGN_OUT: tl.constexpr,
        WIDE: tl.constexpr,
        ACC: tl.constexpr,
        FILTERS: tl.constexpr,
):
    """Gradient of the filters: for each tap, the sum over the channels of a filter of gradient times shifted input."""
    BLOCK_H: tl.constexpr = max(1, FILTERS // (BLOCK_G * BLOCK_W))
    b, h, w, m, g = _place(H, W, G, BLOCK_H, BLOCK_W, BLOCK_M, BLOCK_G, 0, SKEW, WIDE)
    grad_ptr += b * (grad_b * ALIGN_A)
    x_ptr += b * (x_b * ALIGN_B)
    out_ptr += b * (out_b * ALIGN_OUT)
    in_image = (h < H) & (w < W)
    in_channels = (m < M) & (g < G)
    c = m * G + g
    grad_at = h * (grad_h * ALIGN_A) + w * (grad_w * ALIGN_A) + c * grad_c
    grad = tl.load(grad_ptr + grad_at, mask=in_image & in_channels, other=0)  # stays in registers for all taps
    for i in range(K):
        for j in tl.static_range(K):
            tap_h = h + (i - K // 2) * DILATION
            tap_w = w + (j - K // 2) * DILATION
            in_tap = (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
            x_at = tap_h * (x_h * ALIGN_B) + tap_w * (x_w * ALIGN_B) + c * x_c
            acc = grad.to(ACC) * tl.load(x_ptr + x_at, mask=in_tap & in_channels, other=0).to(ACC)
            for m0 in range(BLOCK_M, M, BLOCK_M):  # only where more channels share a filter than a tile holds
                in_more = (m0 + m < M) & (g < G)
                more_grad = tl.load(grad_ptr + (grad_at + m0 * G * grad_c), mask=in_image & in_more, other=0)
                more_x = tl.load(x_ptr + (x_at + m0 * G * x_c), mask=in_tap & in_more, other=0)
                acc += more_grad.to(ACC) * more_x.to(ACC)
            out_at = h * (out_h * ALIGN_OUT) + w * (out_w * ALIGN_OUT) + (i * K + j) * (out_t * ALIGN_OUT) + g * out_g
            total = tl.sum(acc, 0, keep_dims=True)
            tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=in_image & (g < G))


@triton.jit
def probe_kernel(out_ptr):
    """The smallest launch: shows whether Triton works on a device."""
    tl.store(out_ptr, 1.0)
