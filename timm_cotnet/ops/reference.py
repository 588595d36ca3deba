"""Local convolution in plain PyTorch: the definition that every other implementation is checked against.

It is what is scripted, traced, exported and compiled. A padded copy of x is the only buffer besides the output: the
k * k taps are views of it, so memory stays linear in x where `unfold` would need k * k times as much.
"""
import torch
import torch.nn.functional as F


def local_conv_reference(x: torch.Tensor, weight: torch.Tensor, kernel_size: int = 3, dilation: int = 1) -> torch.Tensor:
    """See `timm_cotnet.local_conv`; no checks. Half types are accumulated in float32."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return sum_of_taps(x.float(), weight.float(), kernel_size, dilation).to(x.dtype)
    return sum_of_taps(x, weight, kernel_size, dilation)


def sum_of_taps(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """The same in the dtype of its operands, without a branch, so that `torch.fx` can trace it."""
    B, C, H, W = x.shape
    G = weight.shape[1]
    pad = dilation * (kernel_size // 2)
    # channel c = m * G + g uses filter g: (B, C, H, W) -> (B, C // G, G, H + 2 * pad, W + 2 * pad)
    x = F.pad(x, [pad, pad, pad, pad]).reshape(B, C // G, G, H + 2 * pad, W + 2 * pad)
    weight = weight.unsqueeze(1)  # (B, 1, G, k * k, H, W)
    out = x[:, :, :, :H, :W] * weight[:, :, :, 0]
    for tap in range(1, kernel_size * kernel_size):
        i, j = tap // kernel_size * dilation, tap % kernel_size * dilation
        out = out + x[:, :, :, i:i + H, j:j + W] * weight[:, :, :, tap]
    return out.reshape(B, C, H, W)
