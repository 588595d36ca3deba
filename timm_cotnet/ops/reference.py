"""Local convolution in plain PyTorch: the definition that every other implementation is checked against.

It is what is scripted, traced, exported and compiled. A padded copy of x is the only buffer besides the output: the
k * k taps are views of it, so memory stays linear in x where `unfold` would need k * k times as much.
"""
import torch
import torch.nn.functional as F


def local_conv_reference(
        x: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int = 3,
        dilation: int = 1,
) -> torch.Tensor:
    """Local convolution as `timm_cotnet.local_conv` defines it, unchecked. Half types are accumulated in float32."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return sum_of_taps(x.float(), weight.float(), kernel_size, dilation).to(x.dtype)
    return sum_of_taps(x, weight, kernel_size, dilation)


def sum_of_taps(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Local convolution in the dtype of its operands, without a branch on symbols, so that `torch.fx` can trace it."""
    B, C, H, W = x.shape
    G = weight.shape[1]
    rows = cols = center = kernel_size // 2  # taps on each side of the middle one
    if isinstance(H, int) and isinstance(W, int) and not torch.compiler.is_compiling():
        rows = min(rows, max(H - 1, 0) // dilation)  # those further away never meet the image
        cols = min(cols, max(W - 1, 0) // dilation)
    top, left = rows * dilation, cols * dilation
    # channel c = m * G + g uses filter g: (B, C, H, W) -> (B, C // G, G, H + 2 * top, W + 2 * left)
    x = F.pad(x, [left, left, top, top]).reshape(B, C // G, G, H + 2 * top, W + 2 * left)
    # no tensor of rank above 5, as not every runtime has them
    out = x[:, :, :, top:top + H, left:left + W] * weight[:, :, center * kernel_size + center].unsqueeze(1)
    for row in range(-rows, rows + 1):
        for col in range(-cols, cols + 1):
            if row != 0 or col != 0:
                i, j = top + row * dilation, left + col * dilation
                tap = (center + row) * kernel_size + center + col
                out = out + x[:, :, :, i:i + H, j:j + W] * weight[:, :, tap].unsqueeze(1)
    return out.reshape(B, C, H, W)
