"""1x1 convolutions that read the same tensor, in training on the CPU: `shared_input`."""
from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .memory import empty_like
from .watch import are_watched, is_traced

PART_BYTES = 6_500_000  # of images that are worked on together: what caches hold


def shared_input(x: Tensor, convs: List[nn.Module]) -> Optional[Tuple[Tensor, ...]]:
    """x and what each of convs makes of it, where x is large and they are plain 1x1 convolutions; None elsewhere.

    In the backward the gradients that the readers of x (convs, and whatever reads the x that is returned) have for it
    are summed for a few images at a time, which caches hold. Otherwise each gradient would go to memory and back.
    """
    if is_traced(x) or not x.requires_grad or not all(is_plain_1x1(x, conv) for conv in convs):
        return None
    images = images_at_a_time(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3])
    if images >= x.shape[0]:
        return None
    return SharedInput.apply(x, images, [conv.stride for conv in convs], *(conv.weight for conv in convs))


def images_at_a_time(batch: int, numbers: int) -> int:
    """How many images of so many float32 numbers are worked on together; at most batch."""
    return min(batch, max(1, PART_BYTES // (4 * numbers))) if numbers > 0 else batch


def is_plain_1x1(x: Tensor, conv: nn.Module) -> bool:
    """Whether conv is a 1x1 convolution that trains, of a channels-last float32 tensor on the CPU, and nobody looks."""
    weight = conv.weight if type(conv) is nn.Conv2d else None
    return (
        weight is not None
        and torch.is_grad_enabled()
        and not is_traced(x)
        and conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1 and conv.bias is None
        and all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.dtype == torch.float32
                and t.device.type == 'cpu' for t in (x, weight))
        and weight.requires_grad
        and x.ndim == 4 and x.shape[1] == conv.in_channels
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled('cpu')
        and forward_ad._current_level < 0
        and not are_watched([conv])
    )


class SharedInput(torch.autograd.Function):
    """`apply(x, images, strides, *weights)`, see `shared_input`; images is how many are worked on together."""

    @staticmethod
    def forward(ctx, x, images, strides, *weights):
        ctx.images, ctx.strides = images, strides
        ctx.set_materialize_grads(False)  # zeros for what nobody reads would be as large as x
        ctx.save_for_backward(x, *weights)
        return x, *(torch.conv2d(x, weight, None, stride) for weight, stride in zip(weights, strides))

    @staticmethod
    def backward(ctx, grad_x, *grads):
        x, *weights = ctx.saved_tensors
        read = [i for i, grad in enumerate(grads) if grad is not None]
        grad_weights: List[Optional[Tensor]] = [None] * len(weights)
        # a second derivative is wanted, or many gradients at once: the first one as differentiable plain PyTorch
        if torch.is_grad_enabled() or any(
                grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in (grad_x, *grads)):
            for i in read:
                of_conv, grad_weights[i] = conv_gradients(grads[i], x, weights[i], ctx.strides[i])
                grad_x = of_conv if grad_x is None else grad_x + of_conv
            return grad_x, None, None, *grad_weights
        if not read:
            return grad_x, None, None, *grad_weights
        x = x.contiguous(memory_format=torch.channels_last)
        total = empty_like(x)
        for i in read:
            grad_weights[i] = torch.zeros_like(weights[i])
        for first in range(0, len(x), ctx.images):
            part = slice(first, first + ctx.images)
            summands = [] if grad_x is None else [grad_x[part]]
            for i in read:
                of_conv, of_weight = conv_gradients(grads[i][part], x[part], weights[i], ctx.strides[i])
                summands.append(of_conv)
                grad_weights[i] += of_weight
            add(summands, total[part])
        return total, None, None, *grad_weights


def add(summands: List[Tensor], out: Tensor) -> None:
    """out = the sum of the summands, in one pass for two of them."""
    if len(summands) == 1:
        out.copy_(summands[0])
        return
    torch.add(summands[0], summands[1], out=out)
    for summand in summands[2:]:
        out += summand


def conv_gradients(
        grad: Tensor, x: Tensor, weight: Tensor, stride: Tuple[int, int], of_x: bool = True) -> List[Optional[Tensor]]:
    """Gradients of the input (if of_x) and the filters of a 1x1 convolution."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, (0, 0), (1, 1), False, (0, 0), 1, (of_x, True, False))[:2]
