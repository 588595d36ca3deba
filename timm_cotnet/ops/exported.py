"""Local convolution as exported graphs hold it: few operators that every runtime knows, and runs in large pieces.

A tap needs an image shifted by rows and columns. Runtimes copy what they shift, slice or index, so little is: x by
columns, the eight times smaller filters by rows, and the k sums of products back by rows. Padding, multiplying and
adding is all that is left; no size of an image is written into the graph, and no tensor has a rank above 5.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def is_exporting() -> bool:
    """Whether a graph is made for a runtime: by `torch.export`, an ONNX exporter or `torch.jit.trace`.

    PyTorch 2.6 cannot tell `torch.export` from `torch.compile`; there it gets the definition, as compilers do.
    """
    return torch.jit.is_tracing() or hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()


def local_conv_exported(
        x: Tensor,
        weight: Tensor,
        kernel_size: int = 3,
        dilation: int = 1,
        crops: bool = False,
) -> Tensor:
    """Local convolution, (B, C, H, W) -> (B, C, H, W), unchecked. Half types are accumulated in float32.

    Args:
        x: (B, C, H, W).
        weight: (B, G, k * k, H, W).
        kernel_size: k, odd.
        dilation: Distance between the taps, in pixels.
        crops: Whether a padding may be negative, one operator where else there are two: ONNX has it, Core ML has not.
    """
    dtype = x.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        x, weight = x.float(), weight.float()
    B, C, H, W = x.shape
    G = weight.shape[1]
    center = kernel_size // 2
    # channel c = m * G + g uses filter g: (B, C, H, W) -> (B, C // G, G, H, W), and filters -> (B, 1, taps * G, H, W)
    x = x.reshape(B, C // G, G, H, W)
    rows = weight.transpose(1, 2).reshape(B, 1, kernel_size * kernel_size * G, H, W).split(kernel_size * G, 2)
    columns = [_shifted(x, 0, (center - j) * dilation, crops) for j in range(kernel_size)]
    out = x  # is replaced by the middle row
    for offset in range(kernel_size):
        i = (center + offset) % kernel_size  # the middle one first
        taps = _shifted(rows[i], (i - center) * dilation, 0, crops).split(G, 2)
        total = columns[0] * taps[0]
        for j in range(1, kernel_size):
            total = total + columns[j] * taps[j]
        total = _shifted(total, (center - i) * dilation, 0, crops)
        out = total if offset == 0 else out + total
    return out.reshape(B, C, H, W).to(dtype)


def _shifted(x: Tensor, rows: int, cols: int, crops: bool) -> Tensor:
    """x, (..., H, W), moved down and to the right by one of both; zeros move in."""
    if rows == 0 and cols == 0:
        return x
    n = rows + cols
    if crops and abs(n) == 1:  # more could be more than there is
        return F.pad(x, [cols, -cols, rows, -rows])
    x = F.pad(x, [max(cols, 0), max(-cols, 0), max(rows, 0), max(-rows, 0)])
    if rows == 0:
        return x[..., :-n] if n > 0 else x[..., -n:]
    return x[..., :-n, :] if n > 0 else x[..., -n:, :]
