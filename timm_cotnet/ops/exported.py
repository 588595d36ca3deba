"""Local convolution as exported graphs hold it: few operators that every runtime knows, and runs in large pieces.

A tap needs an image shifted by rows and columns. Runtimes copy what they shift, slice or index, so little is: x by
columns, the eight times smaller filters by rows, and the k sums of products back by rows. Multiplying and adding is all
that is left, and no tensor has a rank above 5. In ONNX graphs of images of a known size, filters are shifted by where
they are cut out; where it may be any, it is not written into the graph.
"""
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

from .watch import is_exporting_program


def is_exporting() -> bool:
    """Whether a graph is made for a runtime: by `torch.export`, an ONNX exporter or `torch.jit.trace`.

    PyTorch before 2.8 cannot always tell `torch.export` from `torch.compile`; there it gets the definition, as
    compilers do.
    """
    return torch.jit.is_tracing() or is_exporting_program()


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
        crops: Whether the graph is one of ONNX, which has negative paddings where Core ML needs two operators, and is
            not compiled by Inductor, which gets images cut out of channels-last ones across taps wrong (PyTorch 2.14).
    """
    dtype = x.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        x, weight = x.float(), weight.float()
    B, C, H, W = x.shape
    G = weight.shape[1]
    center = kernel_size // 2
    x = x.reshape(B, C // G, G, H, W)  # channel c = m * G + g uses filter g
    taps = _rows_of_taps(weight, kernel_size, dilation, crops)
    columns = [_shifted(x, 0, (center - j) * dilation, crops) for j in range(kernel_size)]
    out = x  # is replaced by the middle row
    for offset in range(kernel_size):
        i = (center + offset) % kernel_size  # the middle one first
        total = columns[0] * taps[i][0]
        for j in range(1, kernel_size):
            total = total + columns[j] * taps[i][j]
        total = _shifted(total, (center - i) * dilation, 0, crops)
        out = total if offset == 0 else out + total
    return out.reshape(B, C, H, W).to(dtype)


def _rows_of_taps(weight: Tensor, kernel_size: int, dilation: int, crops: bool) -> List[List[Tensor]]:
    """The filters, (B, 1, G, H, W) for each of k taps in each of k rows, moved by rows; anything may move in."""
    B, G, taps, H, W = weight.shape
    shifts = [(i - kernel_size // 2) * dilation for i in range(kernel_size)]
    if crops and isinstance(H, int):
        n = kernel_size * H
        starts = [i * n - max(-H, min(shift, H)) for i, shift in enumerate(shifts)]
        weight = weight.reshape(B, 1, G, taps * H, W)
        return [weight[:, :, :, start:start + n].split(H, 3) for start in starts]
    rows = weight.transpose(1, 2).reshape(B, 1, taps * G, H, W).split(kernel_size * G, 2)
    return [_shifted(row, shift, 0, crops).split(G, 2) for row, shift in zip(rows, shifts)]


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
