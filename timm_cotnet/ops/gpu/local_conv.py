"""Local convolution on CUDA and ROCm: `torch.library` operators around the kernels of `local_conv_kernels.py`.

The operator is linear in x, in the filters and, contracted with an output gradient, in that: it is one trilinear form.
Its three partial derivatives are the three operators here, so the derivative of each is made of the other two, to any
order. They are `custom_op`s rather than `triton_op`s: there is nothing that Inductor could fuse with them, and a
`custom_op` also runs in Triton's interpreter.
"""
import functools
import math
from typing import Callable, Optional, Tuple

import torch
from torch.autograd import forward_ad

from .walks import power_of_2

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(x: torch.Tensor) -> Optional[str]:
    """The reason why `local_conv_triton` cannot run on x here and now; None if it can."""
    if x.dtype not in _DTYPES:
        return f'there is no kernel for {x.dtype}'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    return _why_not_device(x.device, x.dtype)


@torch.compiler.assume_constant_result
def _why_not_device(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    return _try_device(device, dtype)


@functools.lru_cache(maxsize=None)
def _try_device(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    try:
        from . import local_conv_kernels
    except Exception as error:  # also a Triton that is there but broken: it costs speed only
        return f'Triton cannot be imported ({type(error).__name__}: {error})'
    if local_conv_kernels.INTERPRETED:
        return None
    if device.type != 'cuda':
        return f'Triton kernels run on CUDA and ROCm devices, not on {device.type}'
    if dtype == torch.bfloat16 and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return 'bfloat16 kernels need compute capability 8.0'
    try:  # a missing C compiler, missing Python headers or an unsupported device show only when something is launched
        with torch.cuda.device(device):
            local_conv_kernels.probe_kernel[(1,)](torch.empty(1, device=device))
    except Exception as error:
        return f'Triton cannot launch a kernel on {device} ({type(error).__name__}: {error})'
    return None


def local_conv_triton(x: torch.Tensor, weight: torch.Tensor, kernel_size: int = 3, dilation: int = 1) -> torch.Tensor:
    """Local convolution by Triton kernels: any strides, inputs of one dtype or under autocast."""
    return _local_conv(x, weight, kernel_size, dilation)


@torch.library.custom_op('timm_cotnet::local_conv', mutates_args=())
def _local_conv(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    _check(x, weight, kernel_size)
    out = torch.empty_like(x)
    _launch('weighted_sum_kernel', x, weight, out, weight, kernel_size, dilation, ADJOINT=False)
    return out


@_local_conv.register_fake
def _(x, weight, kernel_size, dilation):
    _check(x, weight, kernel_size)
    return torch.empty_like(x)


@torch.library.custom_op('timm_cotnet::local_conv_input_grad', mutates_args=())
def _input_grad(grad: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    _check(grad, weight, kernel_size)
    out = torch.empty_like(grad)
    _launch('weighted_sum_kernel', grad, weight, out, weight, kernel_size, dilation, ADJOINT=True)
    return out


@_input_grad.register_fake
def _(grad, weight, kernel_size, dilation):
    _check(grad, weight, kernel_size)
    return torch.empty_like(grad)


@torch.library.custom_op('timm_cotnet::local_conv_weight_grad', mutates_args=())
def _weight_grad(
        grad: torch.Tensor, x: torch.Tensor, like: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """`like` gives the shape and the memory layout of the result; its values are not read."""
    _check(x, like, kernel_size, grad)
    out = torch.empty_like(like)
    _launch('weight_grad_kernel', grad, x, out, out, kernel_size, dilation)
    return out


@_weight_grad.register_fake
def _(grad, x, like, kernel_size, dilation):
    _check(x, like, kernel_size, grad)
    return torch.empty_like(like)


def _save(ctx, inputs: Tuple, output: torch.Tensor) -> None:
    *tensors, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _local_conv_backward(ctx, grad: torch.Tensor):
    x, weight = ctx.saved_tensors
    args = (ctx.kernel_size, ctx.dilation)
    return (
        _input_grad(grad, weight, *args) if ctx.needs_input_grad[0] else None,
        _weight_grad(grad, x, weight, *args) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _input_grad_backward(ctx, x: torch.Tensor):
    grad, weight = ctx.saved_tensors
    args = (ctx.kernel_size, ctx.dilation)
    return (
        _local_conv(x, weight, *args) if ctx.needs_input_grad[0] else None,
        _weight_grad(grad, x, weight, *args) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _weight_grad_backward(ctx, weight: torch.Tensor):
    grad, x, _ = ctx.saved_tensors
    args = (ctx.kernel_size, ctx.dilation)
    return (
        _local_conv(x, weight, *args) if ctx.needs_input_grad[0] else None,
        _input_grad(grad, weight, *args) if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


_local_conv.register_autograd(_local_conv_backward, setup_context=_save)
_input_grad.register_autograd(_input_grad_backward, setup_context=_save)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save)


def _autocast(device_type: str) -> Callable:
    """The rule of a convolution. `register_autocast` cannot say it: it wants one fixed dtype."""
    def cast_and_call(x, weight, kernel_size, dilation):
        with torch.autocast(device_type, enabled=False):
            if x.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device_type)
                x, weight = x.to(dtype), weight.to(dtype)
            return _local_conv(x, weight, kernel_size, dilation)
    return cast_and_call


# in the operator's own library, which goes when the package is imported anew
_local_conv._lib.impl('local_conv', _autocast('cuda'), 'AutocastCUDA')
_local_conv._lib.impl('local_conv', _autocast('cpu'), 'AutocastCPU')


def _check(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, grad: Optional[torch.Tensor] = None) -> None:
    """What the kernels rely on, since they would read past the end of a smaller tensor."""
    B, C, H, W = x.shape
    _, G, taps, _, _ = weight.shape
    if weight.shape != (B, G, kernel_size * kernel_size, H, W) or C % G != 0:
        raise ValueError(
            f'local_conv: weight has shape {tuple(weight.shape)}, expected (B, G, {kernel_size * kernel_size}, H, W) '
            f'with B, H, W of x and G a divisor of its channels; x has shape {tuple(x.shape)}')
    for name, tensor in (('weight', weight), ('grad', x if grad is None else grad)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f'local_conv: {name} has dtype {tensor.dtype} on {tensor.device}, x has {x.dtype} on {x.device}; '
                f'move or cast one of them')
    if grad is not None and grad.shape != x.shape:
        raise ValueError(f'local_conv: grad has shape {tuple(grad.shape)}, expected that of x, {tuple(x.shape)}')


def needs_64_bits(*tensors: torch.Tensor) -> bool:
    """Whether a byte of one image (the kernels' offset from its start) is out of reach for 32 bits."""
    return any(
        t.element_size() * sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) >= 2 ** 31
        for t in tensors
    )


def _launch(
        name: str,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
        **flags: bool,
) -> None:
    """Run a kernel on inputs a and b; the first one, (B, C, H, W), sets the tile."""
    if out.numel() == 0:
        return
    reason = _why_not_device(a.device, a.dtype)
    if reason is not None:
        raise RuntimeError(f'local_conv: {reason}')
    from . import local_conv_kernels

    B, C, H, W = a.shape
    G = weight.shape[1]
    M = C // G
    if a.stride(1) == 1:  # channels-last: neighbours in memory are channels
        BLOCK_G = min(power_of_2(G), 64)
        BLOCK_M = min(power_of_2(M), max(8, 64 // BLOCK_G))
        BLOCK_W = min(power_of_2(W), 8)
        SKEW = BLOCK_G * a.element_size() < 128
    else:  # contiguous: neighbours in memory are pixels
        BLOCK_G, BLOCK_M, BLOCK_W, SKEW = 1, min(power_of_2(M), 8), min(power_of_2(W), 64), False

    (strides_a, align_a), (strides_b, align_b), (strides_out, align_out) = map(_strides, (a, b, out))

    def grid(meta):
        BLOCK_H = max(1, meta['FILTERS'] // (BLOCK_G * BLOCK_W))
        return (B * -(-G // BLOCK_G) * -(-H // BLOCK_H) * -(-W // BLOCK_W),)

    with torch.cuda.device_of(a):
        getattr(local_conv_kernels, name)[grid](
            a, b, out, *strides_a, *strides_b, *strides_out, H, W, dilation,
            M=M,
            G=G,
            K=kernel_size,
            PIXELS=(B * H * W).bit_length() // 2,  # sizes within a factor of 4 share their tuning
            BLOCK_W=BLOCK_W,
            BLOCK_M=BLOCK_M,
            BLOCK_G=BLOCK_G,
            SKEW=SKEW,
            ALIGN_A=align_a,
            ALIGN_B=align_b,
            ALIGN_OUT=align_out,
            WIDE=needs_64_bits(a, b, out),
            ACC=local_conv_kernels.accumulator(a.dtype),
            **flags,
        )


def _strides(tensor: torch.Tensor) -> Tuple[Tuple[int, ...], int]:
    """Strides for a kernel and their common factor, up to 16, by which all but that of axis 1 (channels) are divided.

    The kernel multiplies them again: so the compiler learns how far its loads are aligned, and makes them as wide.
    """
    factor = math.gcd(16, *(s for axis, s in enumerate(tensor.stride()) if axis != 1 and tensor.shape[axis] > 1))
    return tuple(s if axis == 1 else s // factor for axis, s in enumerate(tensor.stride())), factor
