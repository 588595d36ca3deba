"""What stand-ins know, and the reasons why one cannot take a module or an input: the conditions of `dispatch.py`.

Each is stated once. A function `why_not_...(module, x)` gives a reason, or None if there is none; `look_at_...` gives
a reason, or what it found.
"""
import importlib
from typing import Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import onednn, parts
from .gpu.local_conv import why_not_triton
from .parts import FLOATS, Found, FoundBlock, find, has_bias, is_plain
from .watch import are_all_watched, is_traced, is_watched, needs_plain_graph

try:
    cpu = importlib.import_module('.cpu', __package__)  # the only import of that folder, without which all works
except ModuleNotFoundError as error:
    if error.name != f'{__package__}.cpu':
        raise
    cpu = None

KINDS: Dict[type, str] = {}  # what `dispatch.known_as` was told
_IS_CUDNN_BUILT = torch.version.hip is None and torch.backends.cudnn.is_available()
_AUTOCAST_ON_CPU = torch._C.DispatchKey.AutocastCPU


# Conditions: surroundings and tensors


def _why_not_now(x: Tensor, dtypes: Tuple[torch.dtype, ...], training: bool) -> Optional[str]:
    """Why kernels of the CPU for training, or those for inference, cannot take x now."""
    reason = _why_not_watched(x, dtypes, training)
    if reason is None and training and not _is_channels_last(x):
        return 'x is not channels-last'
    if reason is None and _is_autocast_on_cpu():
        return 'autocast chooses the dtypes'
    return reason


def _is_autocast_on_cpu() -> bool:
    """By the key that stands for it, as `torch.is_autocast_enabled` reads the name of the device at each call."""
    if torch.compiler.is_compiling():
        return torch.is_autocast_enabled('cpu')
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOCAST_ON_CPU)


def _is_channels_last(x: Tensor) -> bool:
    """Operators of compiled graphs convert what is not."""
    return torch.compiler.is_compiling() or x.is_contiguous(memory_format=torch.channels_last)


def _why_not_on_gpu(x: Tensor, training: bool) -> Optional[str]:
    """Why kernels of a GPU cannot take x now."""
    reason = _why_not_watched(x, FLOATS, training)
    if reason is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype not in (torch.float32, dtype) or dtype not in (torch.bfloat16, torch.float16):
            return f'autocast to {dtype} of an x in {x.dtype}'
    return reason or why_not_triton(x)


def _why_not_watched(x: Tensor, dtypes: Tuple[torch.dtype, ...], training: bool) -> Optional[str]:
    if torch.compiler.is_compiling():
        if needs_plain_graph(x):
            return 'a compiler or exporter wants plain operators'
    elif is_traced(x):
        return 'a tracer, functorch transform or dispatch mode watches operators, or x is a tensor subclass'
    elif x.layout != torch.strided or x.is_neg():
        return 'x is not a dense tensor'
    if x.dtype not in dtypes:
        return f'x is {x.dtype}, not {" or ".join(map(str, dtypes))}'
    shape = x.shape
    if len(shape) != 4 or 0 in shape:
        return f'x of shape {tuple(shape)} is empty or has not 4 dimensions'
    if torch.is_grad_enabled() != training:
        return 'no gradient is wanted (torch.no_grad)' if training else 'a gradient may be wanted (no torch.no_grad)'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    return None


def why_not_native_local_conv(x: Tensor, weight: Tensor, kernel_size: int) -> Optional[str]:
    if cpu is None:
        return _NO_WING
    if kernel_size > cpu.MAX_KERNEL_SIZE:
        return f'kernel_size is {kernel_size}, more than {cpu.MAX_KERNEL_SIZE}'
    if not _is_channels_last(x) \
            or not torch.compiler.is_compiling() and not weight.permute(0, 3, 4, 1, 2).is_contiguous():
        return 'x or its filters are not channels-last'
    if forward_ad._current_level >= 0:
        return 'the kernels have no forward-mode derivative'
    return cpu.why_not(x.dtype)


# Conditions: modules

_NO_WING = 'the package has no folder ops/cpu'


def _is_pointwise(conv: nn.Conv2d, groups: int, any_stride: bool = False) -> bool:
    return conv.kernel_size == (1, 1) and (any_stride or conv.stride == (1, 1)) and conv.padding == (0, 0) \
        and conv.groups == groups


def _is_mixing(first: nn.Conv2d, second: nn.Conv2d, dim: int, logits: int) -> bool:
    return (
        _is_pointwise(first, 1) and _is_pointwise(second, 1) and has_bias(first) and has_bias(second)
        and first.in_channels == dim and second.out_channels == logits and second.in_channels == first.out_channels
    )


def _makes_static(key: nn.Conv2d, channels: int) -> bool:
    """Whether the key convolution gives as many channels and pixels as it gets."""
    (top, left), (down, right), (height, width) = key.padding, key.dilation, key.kernel_size
    return key.in_channels == key.out_channels == channels and key.stride == (1, 1) \
        and 2 * top == down * (height - 1) and 2 * left == right * (width - 1)


def why_not_train_cot_layer(layer: nn.Module, x: Tensor) -> Optional[str]:
    reason = _NO_WING if cpu is None else _why_not_now(x, (torch.float32,), training=True)
    if reason is not None:
        return reason
    m = find(layer, parts.COT_LAYER, x)
    if isinstance(m, str):
        return m
    B = x.shape[0]
    return (
        _why_not_training(layer, m, x)
        or (f'kernel_size is {layer.kernel_size}, more than {cpu.MAX_KERNEL_SIZE}'
            if layer.kernel_size > cpu.MAX_KERNEL_SIZE else None)
        or (f'{_num_threads()} threads share {B} images' if 4 * B < _num_threads() else None)
        or cpu.why_not(x.dtype)
    )


@torch.compiler.assume_constant_result
def _num_threads() -> int:
    return torch.get_num_threads()


def why_not_train_on_gpu(layer: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_on_gpu(x, training=True)
    if reason is not None:
        return reason
    m = find(layer, parts.COT_LAYER, x, any_float=True)
    if isinstance(m, str):
        return m
    return (
        _why_not_training(layer, m, x, any_float=True)
        or ('the mixing has one value of each channel, which has no variance' if len(x) == 1 else None)
        or _why_not_32_bits(x, m['embed.3'].out_channels))


def _why_not_32_bits(x: Tensor, channels: int) -> Optional[str]:
    if x.numel() // x.shape[1] * channels >= 2 ** 31:
        return f'{x.numel() // x.shape[1]} pixels of {channels} channels are too many for 32 bits'
    return None


def _why_not_training(layer: nn.Module, m: Dict[str, nn.Module], x: Tensor, any_float: bool = False) -> Optional[str]:
    """Whether the convolutions and norms of a CoT layer are those that kernels for training know."""
    B, C, H, W = x.shape
    norms = m['conv1x1.1'], m['bn'], m['se.1'], m['key_embed.1'], m['embed.1']
    reason = _why_not_convs(layer, m, x)
    if reason is not None:
        return reason
    for norm in norms:
        reason = _why_not_train_norm(norm, x, any_float)
        if reason is not None:
            return reason
    if len({id(norm._buffers['running_mean']) for norm in norms}) < len(norms):
        return _AVERAGED_TWICE
    return (
        _why_not_filters(layer, m['embed.3'], m['embed.4'], C)
        or ('one value has no variance' if B * H * W == 1 else None)
    )


def _why_not_convs(layer: nn.Module, m: Dict[str, nn.Module], x: Tensor) -> Optional[str]:
    C = x.shape[1]
    if not all(_is_pointwise(m[path], layer.groups) for path in ('embed.0', 'embed.3', 'conv1x1.0')):
        return 'embed.0, embed.3 or conv1x1.0 is not a 1x1 convolution with the groups of the layer'
    if not _is_mixing(m['se.0'], m['se.3'], C, 2 * C):
        return 'se is not made of two 1x1 convolutions with a bias, from dim channels to twice as many'
    embed = m['embed.0']
    if has_bias(embed) or embed.in_channels != 2 * C or not embed._parameters['weight'].is_contiguous():
        return 'embed.0 has a bias or filters that are not contiguous, or does not read x and the static context'
    if not m['conv1x1.1'].num_features == m['bn'].num_features == C == m['conv1x1.0'].out_channels \
            or has_bias(m['conv1x1.0']):
        return 'values or their norms have not as many channels as x, or their convolution has a bias'
    if not _makes_static(m['key_embed.0'], C) or has_bias(m['key_embed.0']) \
            or embed.out_channels != m['embed.3'].in_channels or m['conv1x1.0'].in_channels != C:
        return 'a convolution has other sizes than the layer gives it, or key_embed.0 has a bias'
    for path, channels in (
            ('key_embed.1', C), ('embed.1', embed.out_channels), ('se.1', m['se.0'].out_channels)):
        if m[path].num_features != channels:
            return f'{path} has {m[path].num_features} channels, what it norms has {channels}'
    return None


def why_not_infer_on_gpu(layer: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_on_gpu(x, training=False)
    if reason is not None:
        return reason
    m = find(layer, parts.COT_LAYER, x, any_float=True)
    if isinstance(m, str):
        return m
    for path in ('key_embed.1', 'embed.1', 'conv1x1.1', 'bn', 'se.1'):
        reason = why_not_eval_norm(m[path], x, found=True)
        if reason is not None:
            return reason
    return (
        _why_not_convs(layer, m, x) or _why_not_filters(layer, m['embed.3'], m['embed.4'], x.shape[1])
        or _why_not_32_bits(x, m['embed.3'].out_channels))


def why_not_eval_norm(norm: nn.BatchNorm2d, x: Tensor, found: bool = False) -> Optional[str]:
    """found: whether its parameters are known to be plain."""
    buffers = norm._buffers
    if norm.training or not norm.affine or buffers.get('running_mean') is None or buffers.get('running_var') is None:
        return 'a batch norm does not use running statistics, or has no weight'
    return _why_not_norm(norm, x, any_float=True, found=found)


def _why_not_norm(norm: nn.BatchNorm2d, x: Tensor, any_float: bool, found: bool = False) -> Optional[str]:
    parameters, buffers, size = norm._parameters, norm._buffers, (norm.num_features,)
    weight, bias = parameters.get('weight'), parameters.get('bias')
    mean, var = buffers.get('running_mean'), buffers.get('running_var')
    if weight is None or bias is None or mean is None or var is None \
            or not (found or is_plain(weight, x, any_float) and is_plain(bias, x, any_float)) \
            or not (is_plain(mean, x, any_float) and is_plain(var, x, any_float)) \
            or not weight.shape == bias.shape == mean.shape == var.shape == size \
            or not (weight.is_contiguous() and bias.is_contiguous() and mean.is_contiguous() and var.is_contiguous()):
        return 'a weight or running statistic of a batch norm is not a plain contiguous tensor'
    return None


def why_not_infer_bottleneck_on_gpu(block: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_on_gpu(x, training=False)
    if reason is not None:
        return reason
    m = _find_bottleneck(block, x, any_float=True, any_format=True)
    if isinstance(m, str):
        return m
    return why_not_eval_norm(m['bn1'], x, found=True) or why_not_eval_norm(m['bn3'], x, found=True) \
        or _why_not_32_bits(x, max(m['conv3'].out_channels, x.shape[1])) or _why_not_format(x, m['conv1'])


def why_not_folded_on_gpu(layer: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_on_gpu(x, training=False) or _why_not_cudnn(x)
    if reason is not None:
        return reason
    m = find(layer, parts.FOLDED_COT_LAYER, x)
    if isinstance(m, str):
        return m
    return _why_not_folded(layer, m, x, x.shape[1]) or _why_not_32_bits(x, m['embed.1'].out_channels)


def _why_not_cudnn(x: Tensor) -> Optional[str]:
    if x.dtype == torch.float64 or not _has_cudnn():
        return f'there is no cuDNN, or it is turned off or has no convolution with ReLU for {x.dtype}'
    if torch.is_autocast_enabled(x.device.type):
        return 'autocast chooses the dtypes'
    return None


@torch.compiler.assume_constant_result
def _has_cudnn() -> bool:
    return _IS_CUDNN_BUILT and torch._C._get_cudnn_enabled()  # `torch.backends.cudnn.enabled`, less what surrounds it


def why_not_folded_bottleneck_on_gpu(block: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_on_gpu(x, training=False) or _why_not_cudnn(x)
    if reason is not None:
        return reason
    m = find(block, parts.FOLDED_BOTTLENECK, x)
    return m if isinstance(m, str) else _why_not_format(x, m['conv1'])


def _why_not_format(x: Tensor, conv: nn.Conv2d) -> Optional[str]:
    """For what converts an x that is not channels-last, and back; modules with filters in channels-last do neither."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return None
    if torch.compiler.is_compiling():
        return 'x is not channels-last'
    weight = conv._parameters['weight']  # of one pixel, or of one channel, it is of both formats but for its strides
    if weight.stride(3) == weight.shape[1] != 1:
        return 'x is not channels-last, but filters are, from which on all would be'
    return None


def _why_not_train_norm(norm: nn.BatchNorm2d, x: Tensor, any_float: bool = False) -> Optional[str]:
    """For a norm of which `find` has found that its parameters are plain."""
    if not (norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None
            and norm._buffers.get('num_batches_tracked') is not None):
        return 'a batch norm does not use and average the statistics of the batch, or has no weight'
    return _why_not_norm(norm, x, any_float, found=True)


def _why_not_filters(layer: nn.Module, attn: nn.Conv2d, norm: nn.GroupNorm, channels: int) -> Optional[str]:
    """For what makes the filters, and their norm."""
    size, parameters = (attn.out_channels,), norm._parameters
    weight, bias = parameters.get('weight'), parameters.get('bias')
    if not (has_bias(attn) and weight is not None and bias is not None and weight.shape == bias.shape == size
            and attn.out_channels == norm.num_channels == norm.num_groups * layer.kernel_size ** 2
            and norm.num_groups % layer.groups == 0 and channels % norm.num_groups == 0):
        return 'filters or their norm have other sizes than the layer gives them'
    return None


def _why_not_inference(x: Tensor) -> Optional[str]:
    return _why_not_now(x, (torch.float32, torch.bfloat16), training=False) or onednn.why_not_packed(x.dtype)


def look_at_folded_cot_layer(layer: nn.Module, x: Tensor) -> Found:
    return _why_not_inference(x) or _look_at_folded_cot_layer(layer, x, x.shape[1])


def _look_at_folded_cot_layer(layer: nn.Module, like: Tensor, channels: int) -> Found:
    """For an input like the one given, but with its own number of channels."""
    if cpu is None:
        return _NO_WING
    m = find(layer, parts.FOLDED_COT_LAYER, like)
    if isinstance(m, str):
        return m
    if layer.kernel_size > cpu.MAX_KERNEL_SIZE:
        return f'kernel_size is {layer.kernel_size}, more than {cpu.MAX_KERNEL_SIZE}'
    return _why_not_folded(layer, m, like, channels) or cpu.why_not(like.dtype) or m


def _why_not_folded(layer: nn.Module, m: Dict[str, nn.Module], like: Tensor, C: int) -> Optional[str]:
    """Whether the parts of a folded CoT layer are those that kernels know, for an input of C channels."""
    query, key, attn, value = m['query'], m['key'], m['embed.1'], m['value']
    if not all([_is_pointwise(conv, layer.groups) for conv in (query, key, attn, value)]):
        return 'query, key, embed.1 or value is not a 1x1 convolution with the groups of the layer'
    if not _is_mixing(m['se.0'], m['se.2'], C, 2 * C if layer.paired else C):
        return 'se is not made of two 1x1 convolutions with a bias, from dim channels to as many logits as there are'
    if not _makes_static(m['key_embed.0'], C) or not value.in_channels == query.in_channels == key.in_channels == C \
            or not query.out_channels == key.out_channels == attn.in_channels:
        return 'key_embed.0, query, key or value has other sizes than the layer gives it'
    shift = layer._parameters.get('shift')
    if value.out_channels != C or layer.scale is not None or not is_plain(shift, like) or shift.shape != (C,):
        return 'values have not as many channels as x, or more than a shift is left of the norm behind the filters'
    return _why_not_filters(layer, attn, m['embed.2'], C)


def look_at_folded_stem(stem: nn.Module, x: Tensor) -> Found:
    return _why_not_inference(x) or _find_folded_stem(stem, x)


def look_at_folded_stem_on_gpu(stem: nn.Module, x: Tensor) -> Found:
    reason = _why_not_on_gpu(x, training=False) or _why_not_cudnn(x)
    if reason is not None:
        return reason
    m = _find_folded_stem(stem, x)
    return m if isinstance(m, str) else _why_not_format(x, m['0']) or m


def _find_folded_stem(stem: nn.Module, x: Tensor) -> Found:
    of_stem = parts.FOLDED_STEMS.get(len(stem._modules))
    return 'it is not one convolution with a ReLU, or three' if of_stem is None else find(stem, of_stem, x)


def look_at_folded_bottleneck(block: nn.Module, x: Tensor) -> Found:
    return _why_not_inference(x) or find(block, parts.FOLDED_BOTTLENECK, x)


def look_at_folded_stage(stage: nn.Module, x: Tensor) -> Union[str, List[FoundBlock]]:
    reason = _why_not_inference(x)
    if reason is not None:
        return reason
    blocks = []
    for name, block in stage._modules.items():
        if KINDS.get(type(block)) != 'folded_bottleneck':
            return f'{name} is a {type(block).__name__}, not a folded bottleneck'
        if is_watched(block):
            return f'hooks watch {name}, or its forward is another one'
        m = find(block, parts.FOLDED_BOTTLENECK, x)
        if isinstance(m, str):
            return f'{name}: {m}'
        blocks.append(FoundBlock(block, m, _look_ahead(block, x, m['conv1'].out_channels)))
    return blocks


def _look_ahead(block: nn.Module, like: Tensor, channels: int) -> Optional[Dict[str, nn.Module]]:
    """The parts of a block's CoT layer, None if it has to be called.

    Looking at all layers of a stage in a row takes half as long as looking at each when it is due, when convolutions
    have driven the instructions for it out of the caches.
    """
    pool, layer = block._modules['avd_first'], block._modules['conv2']
    if KINDS.get(type(layer)) != 'folded_cot_layer' or is_watched(pool) or is_watched(layer) \
            or type(pool) is not nn.Identity and KINDS.get(type(pool)) != 'avg_pool':
        return None
    found = _look_at_folded_cot_layer(layer, like, channels)
    return None if isinstance(found, str) else found


def look_at_train_bottleneck(block: nn.Module, x: Tensor) -> Union[str, Tuple[nn.Module, ...]]:
    """Why not, or what `_look_at_downsample` gives."""
    reason = _NO_WING if cpu is None else _why_not_now(x, (torch.float32,), training=True)
    if reason is not None:
        return reason
    m = _find_bottleneck(block, x)
    if isinstance(m, str):
        return m
    if not (_is_pointwise(m['conv1'], 1) and _is_pointwise(m['conv3'], 1)):
        return 'conv1 or conv3 is not a 1x1 convolution of one group'
    reason = _why_not_train_norm(m['bn1'], x) or _why_not_train_norm(m['bn3'], x) or _why_not_in_this_order(block) \
        or cpu.why_not(x.dtype)
    return reason or _look_at_downsample(block, x)


def _look_at_downsample(block: nn.Module, x: Tensor) -> Tuple[nn.Module, ...]:
    """Convolution and norm of a block's `downsample`, or nothing if kernels do not know it."""
    m = find(block, parts.DOWNSAMPLE, x)
    if isinstance(m, str):
        return ()
    _, conv, norm = m.values()
    return (conv, norm) if _is_pointwise(conv, 1, any_stride=True) and _why_not_train_norm(norm, x) is None else ()


def why_not_train_bottleneck_on_gpu(block: nn.Module, x: Tensor) -> Optional[str]:
    reason = _why_not_on_gpu(x, training=True)
    if reason is not None:
        return reason
    m = _find_bottleneck(block, x, any_float=True)
    if isinstance(m, str):
        return m
    return _why_not_train_norm(m['bn1'], x, any_float=True) or _why_not_train_norm(m['bn3'], x, any_float=True) \
        or _why_not_in_this_order(block) or _why_not_32_bits(x, max(m['conv3'].out_channels, x.shape[1]))


_AVERAGED_TWICE = 'a norm is used twice, or two share statistics, and the order in which they average them counts'


def _why_not_in_this_order(block: nn.Module) -> Optional[str]:
    """The shortcut is added by the kernel of bn3, and so computed before it, while the block does so afterwards."""
    if block.downsample is not None:
        mean = block.bn3._buffers['running_mean']
        for module in block.downsample.modules():
            if module._buffers.get('running_mean') is mean:
                return _AVERAGED_TWICE
    return None


def _find_bottleneck(block: nn.Module, x: Tensor, any_float: bool = False, any_format: bool = False) -> Found:
    if torch.compiler.is_compiling():
        return 'a compiler fuses norms with what follows them itself'
    if not any_format and not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is not channels-last'
    if block.se is not None or block.drop_path is not None:
        return 'the block has an attention module behind its norm, or stochastic depth'
    return find(block, parts.BOTTLENECK, x, any_float)


def why_not_pool(module: nn.Module, x: Tensor) -> Optional[str]:
    """Why no kernel pools x, of any mode."""
    reason = why_not_padded_pool(module, x, any_padding=True)
    if reason is None and forward_ad._current_level >= 0:
        reason = 'the kernels have no forward-mode derivative'
    if reason is None and are_all_watched():
        reason = 'hooks see all modules, or functions that they call were replaced'
    return reason or why_not_triton(x)


def why_not_padded_pool(module: nn.Module, x: Tensor, any_padding: bool = False) -> Optional[str]:
    if torch.compiler.is_compiling() or is_traced(x):
        return 'a compiler, exporter or tracer wants plain operators, or x is a tensor subclass'
    if x.ndim != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is empty or not channels-last'
    if module.ceil_mode or not module.count_include_pad or module.divisor_override is not None:
        return 'windows reach beyond the padding, or are divided by other numbers than their sizes'
    if not any_padding and module.padding in (0, (0, 0)):
        return 'nothing is padded'
    return None


def why_not_averaged(module: nn.Module, x: Tensor) -> Optional[str]:
    if not torch.compiler.is_compiling() and is_traced(x):
        return 'a tracer, functorch transform or mode watches operators, or x is a tensor subclass'
    m = find(module, parts.COT_ATTENTION, None)
    if isinstance(m, str):
        return m
    if not (_is_pointwise(m['attention_embed.0'], 1) and _is_pointwise(m['attention_embed.3'], 1)):
        return 'a convolution of attention_embed is not 1x1'
    return None
