"""Local convolution on the CPU, eagerly: shifted slices, accumulated in place, with an explicit backward.

Only x and the filters are saved for the backward, which recomputes the slices: memory stays that of the tensors
themselves. Each tap is one `addcmul_` on the part of the image that the shifted window covers, so nothing is padded.
"""
from typing import Iterator, Tuple

import torch

from .reference import local_conv_reference
from .watch import wants_plain

Window = Tuple[slice, slice]


def taps(kernel_size: int, dilation: int, H: int, W: int) -> Iterator[Tuple[int, Window, Window]]:
    """For each tap: its index, the part of the output that it reaches and the part of the input that it reads."""
    for tap in range(kernel_size * kernel_size):
        di = (tap // kernel_size - kernel_size // 2) * dilation
        dj = (tap % kernel_size - kernel_size // 2) * dilation
        if abs(di) < H and abs(dj) < W:
            yield (
                tap,
                (slice(max(0, -di), H - max(0, di)), slice(max(0, -dj), W - max(0, dj))),
                (slice(max(0, di), H + min(0, di)), slice(max(0, dj), W + min(0, dj))),
            )


def _split(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C // G, G, H, W), a view for every memory format."""
    B, C, H, W = x.shape
    return x.view(B, C // groups, groups, H, W)


def _forward(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    acc_dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    out = torch.zeros_like(x, dtype=acc_dtype)
    xs, ws, outs = _split(x, weight.shape[1]), weight.unsqueeze(1), _split(out, weight.shape[1])
    for tap, (oh, ow), (ih, iw) in taps(kernel_size, dilation, *x.shape[2:]):
        _accumulate(outs[..., oh, ow], xs[..., ih, iw], ws[:, :, :, tap, oh, ow])
    return out.to(x.dtype)


def _accumulate(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    out.addcmul_(a.to(out.dtype), b.to(out.dtype))


def input_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int):
    """Gradient of x."""
    acc_dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    grad_x = torch.zeros_like(x, dtype=acc_dtype)
    gs, ws, outs = _split(grad, weight.shape[1]), weight.unsqueeze(1), _split(grad_x, weight.shape[1])
    for tap, (oh, ow), (ih, iw) in taps(kernel_size, dilation, *x.shape[2:]):
        _accumulate(outs[..., ih, iw], gs[..., oh, ow], ws[:, :, :, tap, oh, ow])
    return grad_x.to(x.dtype)


def weight_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int):
    """Gradient of weight."""
    grad_weight = torch.zeros_like(weight)
    gs, xs = _split(grad, weight.shape[1]), _split(x, weight.shape[1])
    for tap, (oh, ow), (ih, iw) in taps(kernel_size, dilation, *x.shape[2:]):
        product = gs[..., oh, ow] * xs[..., ih, iw]
        grad_weight[:, :, tap, oh, ow] = product.sum(1, dtype=None if product.dtype == torch.float64 else torch.float32)
    return grad_weight


class LocalConvShifted(torch.autograd.Function):
    """`apply(x, weight, kernel_size, dilation)`: inputs of one dtype, already checked."""

    @staticmethod
    def forward(x, weight, kernel_size, dilation):
        return _forward(x, weight, kernel_size, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.kernel_size, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return LocalConvShifted.gradients(ctx, grad, *ctx.saved_tensors)

    @staticmethod
    def gradients(ctx, grad, x, weight):
        """`backward`, with the saved tensors already unpacked."""
        args = (ctx.kernel_size, ctx.dilation)
        if wants_plain(grad):
            with torch.enable_grad():
                x, weight = x.view_as(x), weight.view_as(weight)
                out = local_conv_reference(x, weight, *args)
                wanted = [t for t, need in zip((x, weight), ctx.needs_input_grad) if need]
                grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return tuple(next(grads) if need else None for need in ctx.needs_input_grad[:2]) + (None, None)
        grad_x = input_grad(grad, x, weight, *args) if ctx.needs_input_grad[0] else None
        grad_weight = weight_grad(grad, x, weight, *args) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None

    @staticmethod
    def jvp(ctx, tangent_x, tangent_weight, *_):
        x, weight = ctx.saved_tensors
        args = (ctx.kernel_size, ctx.dilation)
        out = torch.zeros_like(x)
        if tangent_x is not None:
            out = out + local_conv_reference(tangent_x, weight, *args)
        if tangent_weight is not None:
            out = out + local_conv_reference(x, tangent_weight, *args)
        return out
