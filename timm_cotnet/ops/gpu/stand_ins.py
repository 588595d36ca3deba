"""What stands in for CoT layers and bottlenecks on a GPU, where `ops/dispatch.py` found nothing against it."""
import functools
from typing import Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import conditions, onednn
from ..contexts import ContextsSettings
from ..parts import has_bias, is_plain, why_not_conv
from ..watch import TENSORS, are_watched
from .contexts import Mixing, compiled_contexts, dense_arguments, infer_contexts, tap_by_tap
from .conv_norm import conv_norm_act
from .cot_layer import dense, grouped_weight, query_key, train_cot_layer
from .folding import fold_block, fold_layer, order_filters
from .images import change_format, channels_last
from .norm import norm_act, norm_act_eval
from .pool import avg_pool

__all__ = [
    'infer_bottleneck', 'infer_cot_layer', 'infer_folded_bottleneck', 'infer_folded_cot_layer', 'infer_folded_stem',
    'padded_pool', 'pool', 'train_bottleneck', 'train_cot_layer']


def train_bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    """A `CotBottleneck` or `SplitAttnBottleneck` in training, channels-last: norms with what follows them in a pass."""
    parts, shortcut = block._modules, None
    conv1, norm1 = parts['conv1'], parts['bn1']
    dtype = _dtype_of_product(x, conv1, norm1) if block.downsample is None and x.requires_grad else None
    if dtype is None:
        out = _conv_norm(x, conv1, norm1)
    else:
        out, shortcut = conv_norm_act(x if x.dtype == dtype else x.to(dtype), conv1, norm1, with_shortcut=True)
    out = parts['avd_last'](parts['conv2'](parts['avd_first'](out)))
    return _conv_norm(out, parts['conv3'], parts['bn3'], residual=_shortcut(block, x), shortcut=shortcut)


def _conv_norm(
        x: Tensor,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        relu: bool = True,
        residual: Optional[Tensor] = None,
        shortcut: Optional[Tensor] = None,
) -> Tensor:
    """`relu(norm(conv(x)) + residual)` of modules that are known, as a product of matrices if it can be one.

    Kernels make a new tensor for the residual's gradient, so these read the shortcut instead, where that is given.
    """
    dtype = _dtype_of_product(x, conv, norm, residual)
    if dtype is None:
        return _norm(conv(x), norm, relu, residual, shortcut)
    return conv_norm_act(x if x.dtype == dtype else x.to(dtype), conv, norm, relu,
                         residual if shortcut is None else shortcut)


def _dtype_of_product(
        x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, residual: Optional[Tensor] = None) -> Optional[torch.dtype]:
    """In which a convolution with its norm in training is a product of matrices; None: it is none."""
    if not norm.training or type(x) not in TENSORS or x.ndim != 4 or not _folds(conv, norm):
        return None
    filters, (B, C, H, W), outputs = conv._parameters['weight'], x.shape, norm.num_features
    is_cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
    known = (dtype, torch.float32) if is_cast else (dtype,)
    is_one = dtype != torch.float32 and x.dtype in known and filters.dtype in known \
        and x.device == filters.device == norm._parameters['weight'].device \
        and C == conv.in_channels and 1 < B * H * W < 2 ** 31 // max(C, outputs) \
        and (residual is None or type(residual) in TENSORS and residual.shape == (B, outputs, H, W))
    return dtype if is_one else None


def _norm(
        x: Tensor,
        norm: nn.BatchNorm2d,
        relu: bool = True,
        residual: Optional[Tensor] = None,
        shortcut: Optional[Tensor] = None,
) -> Tensor:
    """`relu(norm(x) + residual)`, by a kernel if it can take what came from modules, which may be any.

    That reads the shortcut instead of the residual, see `_conv_norm`.
    """
    if type(x) in TENSORS and x.device == norm.weight.device and x.ndim == 4 \
            and x.shape[1] == norm.num_features < x.numel() < 2 ** 31 \
            and (residual is None or type(residual) in TENSORS and residual.shape == x.shape):
        return (norm_act if norm.training else norm_act_eval)(x, norm, relu, residual if shortcut is None else shortcut)
    out = norm(x)
    if residual is not None:
        out += residual  # in place, as in the block: it may have fewer values, not more
    return F.relu(out) if relu else out


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    """What a block adds; its norm by a kernel where it is like the block's others."""
    downsample = block.downsample
    if downsample is None:
        return x
    modules = list(downsample._modules.values()) if type(downsample) is nn.Sequential else []  # slices are modules
    *others, last = modules or [None]
    like = block.bn3
    if type(last) is not nn.BatchNorm2d or are_watched([downsample]) or last.training != like.training \
            or last.affine != like.affine or last.running_mean is None or last.momentum is None \
            or 'weight' not in last._parameters or type(last.weight) is not nn.Parameter:
        return downsample(x)
    *others, conv = others or [None]
    for module in others:
        x = module(x)
    if type(conv) is nn.Conv2d and why_not_conv(conv.__dict__, conv._parameters) is None \
            and is_plain(conv._parameters['weight'], x, any_float=True):
        return _conv_norm(x, conv, last, relu=False)
    return _norm(x if conv is None else conv(x), last, relu=False)


def _in_channels_last(run: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Decorator: images of another memory format are converted, and what comes out is contiguous then."""
    @functools.wraps(run)
    def convert(module: nn.Module, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            return run(module, x)
        if torch.compiler.is_compiling():
            return run(module, channels_last(x)).contiguous()
        out = run(module, change_format(x.contiguous()))
        return out if out.is_contiguous() else change_format(channels_last(out), back=True)
    return convert


@_in_channels_last
def infer_cot_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A `CotLayer` or `CoxtLayer` in evaluation without a gradient, (B, dim, H, W) -> (B, dim, H, W)."""
    return _cot_layer_in_graph(layer, x) if torch.compiler.is_compiling() else _cot_layer(layer, x)


def _cot_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with its norms folded on the way; x is channels-last."""
    dtype = _dtype(x)
    x, f = x if x.dtype == dtype else x.to(dtype), fold_layer(layer, dtype)
    parts = layer._modules
    key, se, embed = (parts[name]._modules for name in ('key_embed', 'se', 'embed'))
    key, se1, se2, attn, norm = key['0'], se['0'], se['3'], embed['3'], embed['4']
    fused, ones, nothing = _is_fused(dtype), (1, 1), (0, 0)
    static = _conv2d_relu(
        x, f.key, f.key_bias, None, ones, key.padding, key.dilation, f.key_groups, fused=fused)
    hidden = _conv2d_relu(
        static, f.of_key[:, :, None, None], f.bias, _conv1x1(x, f.query), ones, nothing, ones, 1, fused=fused)
    logits, value = _conv1x1(hidden, f.attn), _conv1x1(x, f.value, f.value_bias)
    s = ContextsSettings(layer.kernel_size, layer.dilation, layer.groups, norm.num_groups, filter_eps=norm.eps)
    mixing = Mixing(se1.weight, se1.bias, f.mixing_table, se2.weight, se2.bias)
    return _contexts(value, logits, static, (attn.bias, norm.weight, norm.bias), None, f.shift, mixing, s)


def _is_fused(dtype: torch.dtype) -> bool:
    """Whether cuDNN has convolutions with ReLU."""
    return dtype != torch.float64 and conditions._has_cudnn()


def _conv1x1(x: Tensor, filters: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """A 1x1 convolution with filters (out, channels) of an x that is channels-last."""
    if x.dtype == torch.float32:  # whether it may run in TF32 is said for convolutions and for products apart
        return F.conv2d(x, filters[:, :, None, None], bias)
    return F.linear(x.permute(0, 2, 3, 1), filters, bias).permute(0, 3, 1, 2)  # adds the bias in its own pass


def _cot_layer_in_graph(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer for a compiler, which makes of norms with ReLU what is best."""
    groups = layer.groups
    parts = layer._modules
    key, key_norm, _ = parts['key_embed']
    first, first_norm, _, attn, filter_norm = parts['embed']
    conv, value_norm = parts['conv1x1']
    se1, se_norm, _, se2 = parts['se']
    static = F.relu(key_norm(_conv(key, x)))
    of_query, of_key = query_key(first.weight, groups)
    hidden = F.relu(first_norm(F.conv2d(x, of_query) + F.conv2d(static, of_key)))
    logits = F.conv2d(hidden, tap_by_tap(dense(attn.weight, groups), layer.kernel_size, groups))
    value = F.conv2d(x, dense(conv.weight, groups))
    s = ContextsSettings(
        layer.kernel_size, layer.dilation, groups, filter_norm.num_groups, filter_eps=filter_norm.eps)
    value_table, table, mixing_table = (_table_in_graph(norm, value.dtype) for norm in (value_norm, layer.bn, se_norm))
    mixing = Mixing(se1.weight, se1.bias, mixing_table, se2.weight, se2.bias)
    return _contexts(
        value, logits, static, (attn.bias, filter_norm.weight, filter_norm.bias), value_table, table, mixing, s)


def _table_in_graph(norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    """Scale and shift of a norm, (2, C)."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    return torch.stack([scale, norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale])


def _contexts(value: Tensor, logits: Tensor, static: Tensor, *args) -> Tensor:
    """Output of a layer from the results of its convolutions, whether eagerly or as an operator of a graph."""
    if torch.compiler.is_compiling():
        return compiled_contexts(value, logits, static, *args)
    *args, s = args
    return infer_contexts(*map(channels_last, (value, logits, static)), *dense_arguments(*args), s=s)


@_in_channels_last
def infer_bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    """A `CotBottleneck` or `SplitAttnBottleneck` in evaluation without a gradient, (B, C, H, W) -> (B, C', H', W')."""
    parts = block._modules
    conv1, norm1, conv3, norm3 = (parts[name] for name in ('conv1', 'bn1', 'conv3', 'bn3'))
    shortcut = _look_at_shortcut(block.downsample, x, conv1.in_channels, conv3.out_channels)
    if not (_folds(conv1, norm1) and _folds(conv3, norm3)) or shortcut is None:
        out = _norm(conv1(x), norm1)
        out = parts['avd_last'](parts['conv2'](parts['avd_first'](out)))
        return _norm(conv3(out), norm3, residual=_shortcut(block, x))
    dtype = _dtype(x)
    *pools, conv = shortcut
    f = fold_block(conv1, norm1, conv3, norm3, conv, dtype)
    fused, ones, nothing = _is_fused(dtype), (1, 1), (0, 0)
    x = x if x.dtype == dtype else x.to(dtype)
    out = _conv2d_relu(x, f.conv1[:, :, None, None], f.bias1, None, ones, nothing, ones, 1, fused=fused)
    out = parts['avd_last'](parts['conv2'](parts['avd_first'](out)))
    for module in pools:
        x = module(x)
    if conv is not None:
        x = F.conv2d(x, f.shortcut[:, :, None, None], None, conv[0].stride)
    out, x = (t if t.dtype == dtype else t.to(dtype) for t in (out, x))
    B, _, H, W = out.shape
    fused = fused and x.shape == (B, conv3.out_channels, H, W)  # it may have fewer values, not more
    out = _conv2d_relu(out, f.conv3[:, :, None, None], f.bias3, x, ones, nothing, ones, 1, fused=fused)
    return channels_last(out)


def _folds(conv: nn.Module, norm: nn.BatchNorm2d) -> bool:
    """Whether a norm that is known folds into a 1x1 convolution that is known."""
    return conditions._is_pointwise(conv, 1) and not has_bias(conv) and conv.out_channels == norm.num_features


def _look_at_shortcut(downsample: Optional[nn.Module], x: Tensor, inputs: int, outputs: int) -> Optional[Tuple]:
    """What comes before the convolution of a shortcut, and at the end that with its norm; None if it is unknown."""
    if downsample is None:
        return (None,)
    if type(downsample) is not nn.Sequential or len(downsample._modules) < 2 or are_watched([downsample]):
        return None
    *pools, conv, norm = downsample._modules.values()
    parameters = conv._parameters
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or why_not_conv(conv.__dict__, parameters) \
            or conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1 or has_bias(conv) \
            or (conv.in_channels, conv.out_channels) != (inputs, outputs) or norm.num_features != outputs \
            or not is_plain(parameters['weight'], x, any_float=True) or conditions.why_not_eval_norm(norm, x):
        return None
    return (*pools, (conv, norm))


@_in_channels_last
def infer_folded_cot_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A `FoldedCotLayer` without a gradient, (B, dim, H, W) -> (B, dim, H, W)."""
    parts, groups = layer._modules, layer.groups
    _, attn, norm = parts['embed']._modules.values()
    query, value, (se1, _, se2) = parts['query'], parts['value'], parts['se']._modules.values()
    static = conv_act(parts['key_embed']._modules['0'], x)
    of_query = _conv1x1(x, query.weight.flatten(1)) if groups == 1 else F.conv2d(x, query.weight, groups=groups)
    hidden = conv_act(parts['key'], static, channels_last(of_query), query.bias)
    if torch.compiler.is_compiling():
        filters = tap_by_tap(dense(attn.weight, groups), layer.kernel_size, groups).flatten(1)
    else:
        filters = order_filters(layer)
    logits = _conv1x1(hidden, filters)
    value = _conv1x1(x, dense(value.weight, groups).flatten(1), value.bias)
    s = ContextsSettings(layer.kernel_size, layer.dilation, groups, norm.num_groups, filter_eps=norm.eps)
    mixing = Mixing(se1.weight, se1.bias, None, se2.weight, se2.bias)
    return _contexts(value, logits, static, (attn.bias, norm.weight, norm.bias), None, layer.shift, mixing, s)


@_in_channels_last
def infer_folded_stem(stem: nn.Module, x: Tensor) -> Tensor:
    """A `FoldedStem` without a gradient: (B, in_chans, H, W) -> (B, C, H', W')."""
    for conv in list(stem)[::2]:
        x = conv_act(conv, x)
    return x


@_in_channels_last
def infer_folded_bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    """A `FoldedBottleneck` without a gradient, (B, C, H, W) -> (B, C', H', W')."""
    parts = block._modules
    out = conv_act(parts['conv1'], x)
    out = parts['avd_last'](parts['conv2'](parts['avd_first'](out)))
    conv, bias = parts['conv3'], parts['conv3'].bias
    shortcut = x
    if block.downsample is not None:
        sequence = type(block.downsample) is nn.Sequential and len(block.downsample) > 0
        last = block.downsample[-1] if sequence else None
        if type(last) is nn.Conv2d and last.bias is not None and not are_watched([block.downsample]):
            *pools, _ = block.downsample
            for module in pools:
                shortcut = module(shortcut)
            shortcut = F.conv2d(shortcut, last.weight, None, last.stride, last.padding, last.dilation, last.groups)
            bias = bias + last.bias  # one bias for both, as each is a pass of its own behind a convolution
        else:
            shortcut = block.downsample(x)
    B, _, H, W = out.shape
    if shortcut.shape != (B, conv.out_channels, H, W):  # it may be spread, which cuDNN does not do
        return channels_last(F.relu(
            F.conv2d(out, conv.weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups) + shortcut))
    return conv_act(conv, out, shortcut, bias)


def conv_act(conv: nn.Conv2d, x: Tensor, addend: Optional[Tensor] = None, bias: Optional[Tensor] = None) -> Tensor:
    """`relu(conv(x) + addend)` in one call of cuDNN, with a bias other than the module's if one is given."""
    parameters = conv._parameters  # as `nn.Module.__getattr__` is slow
    args = (parameters['weight'], parameters.get('bias') if bias is None else bias, addend, conv.stride, conv.padding,
            conv.dilation, conv.groups, 'relu')
    if torch.compiler.is_compiling():
        return torch.ops.timm_cotnet.conv2d_act(x, *args)
    return _conv2d_relu(x, *args)


def _conv2d_relu(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        addend: Optional[Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        act: str = 'relu',
        fused: bool = True,
) -> Tensor:
    """`onednn.conv2d_act` on a GPU, of which act is ReLU; fused: whether there are operators of cuDNN for it."""
    if not fused:
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (out if addend is None else out.add_(addend)).relu_()
    if x.dtype != torch.float32 and addend is None and bias is not None and groups == 1 and weight.shape[2:] == (1, 1) \
            and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        B, C, H, W = x.shape  # a matrix product with ReLU takes less of the host's time
        rows = x.permute(0, 2, 3, 1).reshape(-1, C)
        out = torch._addmm_activation(bias, rows, weight.reshape(-1, C).t())
        return out.view(B, H, W, -1).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = (stride, padding, dilation, groups)
    if addend is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, addend, 1.0, bias, *geometry)


def _conv2d_relu_in_graph(x: Tensor, weight: Tensor, bias: Optional[Tensor], addend: Optional[Tensor], *args) -> Tensor:
    x, addend = (t if t is None else t.contiguous(memory_format=torch.channels_last) for t in (x, addend))
    with torch.cuda.device_of(x):
        return _conv2d_relu(x, weight, bias, addend, *args).contiguous(memory_format=torch.channels_last)


onednn.LIBRARY.impl('conv2d_act', _conv2d_relu_in_graph, 'CUDA')


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight, groups = grouped_weight(conv, _dtype(x))
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, groups)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def pool(module: nn.Module, x: Tensor) -> Tensor:
    """An average pool of channels-last images, of which PyTorch's own takes seven times as long."""
    return avg_pool(x, _pair(module.kernel_size), _pair(module.stride), _pair(module.padding))


def padded_pool(module: nn.Module, x: Tensor) -> Tensor:
    """An average pool in plain PyTorch, of zeros put around the image before: that has the right gradient."""
    top, left = _pair(module.padding)
    return F.avg_pool2d(F.pad(x, (left, left, top, top)), module.kernel_size, module.stride)


def _pair(n):
    return n if isinstance(n, tuple) else (n, n)
