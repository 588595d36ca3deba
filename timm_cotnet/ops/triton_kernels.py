"""Triton kernels of local convolution for CUDA and ROCm; `triton.py` launches them. The only file that imports Triton.

A program owns a tile of BLOCK_H x BLOCK_W pixels by BLOCK_M x BLOCK_G channels. Channel c = m * G + g uses filter g, so
that a filter value is loaded once for all BLOCK_M channels that share it. Every output element is written by one program,
which adds up in a fixed order: no atomics. Strides are general; a stride of 1 is known at compile time and gives wide loads.
"""
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a sum over values of dtype is kept."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _configs():
    """TILE is the number of elements in a program's tile: 16, 32 or 64 for each thread."""
    configs = [triton.Config({'TILE': tile}, num_warps=warps) for tile, warps in ((4096, 4), (2048, 4), (8192, 4), (8192, 8))]
    return configs[:1] if INTERPRETED else configs  # the interpreter has nothing to time


def _without_timing_in_a_capture(configs, named_args, **kwargs):
    """Timing synchronizes, which a CUDA graph that is being captured forbids."""
    return configs[:1] if torch.cuda.is_current_stream_capturing() else configs


_autotune = triton.autotune(
    configs=_configs(),
    key=['PIXELS', 'M', 'G', 'K', 'BLOCK_G', 'M_AXIS'],
    prune_configs_by={'early_config_prune': _without_timing_in_a_capture},
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
        WIDE: tl.constexpr,
):
    """This program's image (64 bits, it may be far away) and its tile's rows, columns, m and g, each with three axes.

    The axes are (m, pixel, g) for M_AXIS = 0, which gives a thread all channels of its filter, and (pixel, m, g) for
    M_AXIS = 1, which gives them to neighbouring threads. Offsets inside an image need 64 bits only if WIDE.
    """
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles_h = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    w = pid % tiles_w * BLOCK_W
    pid = pid // tiles_w
    h = pid % tiles_h * BLOCK_H
    pid = pid // tiles_h
    g = pid % tl.cdiv(G, BLOCK_G) * BLOCK_G
    b = (pid // tl.cdiv(G, BLOCK_G)).to(tl.int64)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h += pixel // BLOCK_W
    w += pixel % BLOCK_W
    m = tl.arange(0, BLOCK_M)
    g += tl.arange(0, BLOCK_G)
    if WIDE:
        h, w, m, g = h.to(tl.int64), w.to(tl.int64), m.to(tl.int64), g.to(tl.int64)
    if M_AXIS == 0:
        return b, h[None, :, None], w[None, :, None], m[:, None, None], g[None, None, :]
    else:
        return b, h[:, None, None], w[:, None, None], m[None, :, None], g[None, None, :]


@_autotune
@triton.jit
def weighted_sum_kernel(
        x_ptr, weight_ptr, out_ptr,
        x_b, x_c, x_h, x_w,
        weight_b, weight_g, weight_t, weight_h, weight_w,
        out_b, out_c, out_h, out_w,
        H, W,
        M: tl.constexpr,
        G: tl.constexpr,
        K: tl.constexpr,
        DILATION: tl.constexpr,
        ADJOINT: tl.constexpr,
        PIXELS: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_G: tl.constexpr,
        M_AXIS: tl.constexpr,
        WIDE: tl.constexpr,
        ACC: tl.constexpr,
        TILE: tl.constexpr,
):
    """Local convolution; with ADJOINT its transpose, which maps the gradient of the output to that of the input."""
    BLOCK_H: tl.constexpr = max(1, TILE // (BLOCK_M * BLOCK_G * BLOCK_W))
    b, h, w, m, g = _place(H, W, G, BLOCK_H, BLOCK_W, BLOCK_M, BLOCK_G, M_AXIS, WIDE)
    x_ptr += b * x_b
    weight_ptr += b * weight_b + g * weight_g
    out_ptr += b * out_b + h * out_h + w * out_w
    in_image = (h < H) & (w < W)
    for m0 in range(0, M, BLOCK_M):
        in_channels = (m0 + m < M) & (g < G)
        c = (m0 + m) * G + g
        acc = tl.zeros((c + h).shape, ACC)
        for tap in tl.static_range(K * K):
            # the transpose scatters where the convolution gathers: what reaches a pixel comes from the other side
            away = -DILATION if ADJOINT else DILATION
            tap_h = h + (tap // K - K // 2) * away
            tap_w = w + (tap % K - K // 2) * away
            in_tap = (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
            if ADJOINT:
                filter_at = tap_h * weight_h + tap_w * weight_w
                filter_mask = in_tap & (g < G)
            else:
                filter_at = h * weight_h + w * weight_w
                filter_mask = in_image & (g < G)
            values = tl.load(x_ptr + (tap_h * x_h + tap_w * x_w + c * x_c), mask=in_tap & in_channels, other=0)
            filters = tl.load(weight_ptr + (tap * weight_t + filter_at), mask=filter_mask, other=0)
            acc += values.to(ACC) * filters.to(ACC)
        tl.store(out_ptr + c * out_c, acc.to(out_ptr.dtype.element_ty), mask=in_image & in_channels)


@_autotune
@triton.jit
def weight_grad_kernel(
        grad_ptr, x_ptr, out_ptr,
        grad_b, grad_c, grad_h, grad_w,
        x_b, x_c, x_h, x_w,
        out_b, out_g, out_t, out_h, out_w,
        H, W,
        M: tl.constexpr,
        G: tl.constexpr,
        K: tl.constexpr,
        DILATION: tl.constexpr,
        PIXELS: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_G: tl.constexpr,
        M_AXIS: tl.constexpr,
        WIDE: tl.constexpr,
        ACC: tl.constexpr,
        TILE: tl.constexpr,
):
    """Gradient of the filters: for each tap, the sum over the channels of a filter of gradient times shifted input."""
    BLOCK_H: tl.constexpr = max(1, TILE // (BLOCK_M * BLOCK_G * BLOCK_W))
    b, h, w, m, g = _place(H, W, G, BLOCK_H, BLOCK_W, BLOCK_M, BLOCK_G, M_AXIS, WIDE)
    grad_ptr += b * grad_b + h * grad_h + w * grad_w
    x_ptr += b * x_b
    out_ptr += b * out_b + h * out_h + w * out_w + g * out_g
    in_image = (h < H) & (w < W)
    c = m * G + g
    in_channels = (m < M) & (g < G)
    grad = tl.load(grad_ptr + c * grad_c, mask=in_image & in_channels, other=0).to(ACC)  # stays in registers for all taps
    for tap in tl.static_range(K * K):
        tap_h = h + (tap // K - K // 2) * DILATION
        tap_w = w + (tap % K - K // 2) * DILATION
        in_tap = (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
        tap_ptr = x_ptr + (tap_h * x_h + tap_w * x_w)
        acc = grad * tl.load(tap_ptr + c * x_c, mask=in_tap & in_channels, other=0).to(ACC)
        for m0 in range(BLOCK_M, M, BLOCK_M):  # only where more channels share a filter than a tile holds
            more = (m0 + m < M) & (g < G)
            more_grad = tl.load(grad_ptr + (c + m0 * G) * grad_c, mask=in_image & more, other=0).to(ACC)
            acc += more_grad * tl.load(tap_ptr + (c + m0 * G) * x_c, mask=in_tap & more, other=0).to(ACC)
        total = tl.sum(acc, M_AXIS, keep_dims=True)
        tl.store(out_ptr + tap * out_t, total.to(out_ptr.dtype.element_ty), mask=in_image & (g < G))


@triton.jit
def probe_kernel(out_ptr):
    """The smallest launch: shows whether Triton works on a device."""
    tl.store(out_ptr, 1.0)
