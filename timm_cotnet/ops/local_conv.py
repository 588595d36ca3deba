"""Front end of local convolution: checks its input, then calls the implementation that `dispatch.py` chooses."""
import torch

from .dispatch import choose_local_conv
from .exported import is_exporting, local_conv_exported
from .reference import sum_of_taps

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def local_conv(x: torch.Tensor, weight: torch.Tensor, kernel_size: int = 3, dilation: int = 1) -> torch.Tensor:
    """Convolve every pixel with a k x k filter of its own, zero-padded so that the size stays.

    Channel c uses filter group c mod G:
    `out[b, c, h, w] =
    sum over (i, j) of weight[b, c % G, i * k + j, h, w] * x_padded[b, c, h + i * dilation, w + j * dilation]`

    The dynamic context of CoT (arXiv:2107.12292, section 3.2); the official module is `LocalConvolution` in
    `cupy_layers/aggregation_zeropad.py`.

    Args:
        x: Values, (B, C, H, W), in float64, float32, bfloat16 or float16; contiguous or channels-last.
        weight: Filters, (B, G, k * k, H, W), for any G that divides C; same dtype and device as x. Under autocast
            both are cast to its dtype, as for a convolution.
        kernel_size: k, odd.
        dilation: Distance between the taps of a filter, in pixels.

    Returns:
        (B, C, H, W), in the dtype and memory format of x.

    Raises:
        ValueError: If a type, shape, layout, dtype or device does not fit, naming the argument and what was expected.
    """
    if torch.jit.is_scripting():
        return local_conv_exported(x, weight, kernel_size, dilation)
    else:
        return _local_conv_eager(x, weight, kernel_size, dilation)


def grouped_local_conv(
        x: torch.Tensor,
        attn: torch.Tensor,
        kernel_size: int,
        dilation: int,
        groups: int,
) -> torch.Tensor:
    """Local convolution of each of `groups` consecutive slices of the channels with its own slice of the filters.

    Args:
        x: Values, (B, C, H, W).
        attn: Filters, (B, G * k * k, H, W), filter by filter.
    """
    B, C, H, W = x.shape
    taps = kernel_size * kernel_size
    attn = attn.view(B, attn.shape[1] // taps, taps, H, W)
    if groups == 1:
        return local_conv(x, attn, kernel_size, dilation)
    c, g = C // groups, attn.shape[1] // groups
    if torch.jit.is_scripting() or _is_exporting():  # groups as images: nothing is sliced or concatenated
        x, attn = x.reshape(B * groups, c, H, W), attn.reshape(B * groups, g, taps, H, W)
        return local_conv(x, attn, kernel_size, dilation).reshape(B, C, H, W)
    return torch.cat([
        local_conv(x[:, i * c:(i + 1) * c], attn[:, i * g:(i + 1) * g], kernel_size, dilation) for i in range(groups)
    ], 1)


@torch.jit.unused
def _is_exporting() -> bool:
    return is_exporting()


@torch.jit.unused
def _local_conv_eager(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    if isinstance(x, torch.fx.Proxy) or isinstance(weight, torch.fx.Proxy):
        return sum_of_taps(x, weight, kernel_size, dilation)  # sizes and dtypes are symbols there: nothing to check
    if torch.jit.is_tracing():
        # sizes are tensors there: nothing to check
        return choose_local_conv(x, weight, kernel_size)(x, weight, kernel_size, dilation)
    _check(x, weight, kernel_size, dilation)
    device_type = x.device.type
    autocast = device_type != 'meta' and torch.is_autocast_enabled(device_type)  # 'meta' has none
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f'local_conv: weight has dtype {weight.dtype}, x has {x.dtype}; cast one of them')
    return choose_local_conv(x, weight, kernel_size)(x, weight, kernel_size, dilation)


def _check(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> None:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'local_conv: kernel_size is {kernel_size!r}, expected a positive odd integer')
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f'local_conv: dilation is {dilation!r}, expected a positive integer')
    for name, tensor in (('x', x), ('weight', weight)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f'local_conv: {name} is a {type(tensor).__name__}, expected a tensor')
        if tensor.layout != torch.strided:
            raise ValueError(f'local_conv: {name} has layout {tensor.layout}, expected a dense tensor (to_dense())')
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f'local_conv: {name} has dtype {tensor.dtype}, expected one of {", ".join(map(str, _DTYPES))}')
    if x.ndim != 4:
        raise ValueError(f'local_conv: x has shape {tuple(x.shape)}, expected 4 dimensions (B, C, H, W)')
    if weight.ndim != 5:
        raise ValueError(
            f'local_conv: weight has shape {tuple(weight.shape)}, expected 5 dimensions (B, G, k * k, H, W)')
    B, C, H, W = x.shape
    G = weight.shape[1]
    if G < 1 or C % G != 0:
        raise ValueError(f'local_conv: weight has {G} groups, expected a divisor of the {C} channels of x')
    expected = (B, G, kernel_size * kernel_size, H, W)
    if weight.shape != expected:
        raise ValueError(
            f'local_conv: weight has shape {tuple(weight.shape)}, expected {tuple(expected)} for x of shape '
            f'{tuple(x.shape)} and kernel_size {kernel_size}')
    if weight.device != x.device:
        raise ValueError(f'local_conv: weight is on {weight.device}, expected it on {x.device} like x')
