"""What stand-ins know of the modules whose place they take: their children, of which exact types, in which places."""
from typing import Dict, List, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from .watch import TENSORS, are_all_watched, is_patched

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided
_CONV = nn.Conv2d
_WEIGHTED = (nn.BatchNorm2d, nn.GroupNorm)
Found = Union[str, Dict[str, nn.Module]]  # the parts of a module by their paths, or why a stand-in cannot take it


class _Part(NamedTuple):
    """What a stand-in knows of one module below another."""
    parent: int  # in the list of those found before, of which the first is the whole
    name: str
    path: str
    type: type
    size: int  # number of children of an `nn.Sequential`


class FoundBlock(NamedTuple):
    """What was found of a folded bottleneck."""
    block: nn.Module
    parts: Dict[str, nn.Module]
    layer: Optional[Dict[str, nn.Module]] = None  # the parts of its CoT layer, if that need not be asked again


def _parts(**children: object) -> List[_Part]:
    """The parts of a module, of each its exact type, or a list of those of the children of an `nn.Sequential`."""
    rows = []
    for name, kind in children.items():
        if isinstance(kind, list):
            rows.append(_Part(0, name, name, nn.Sequential, len(kind)))
            parent = len(rows)
            rows.extend(_Part(parent, str(i), f'{name}.{i}', of_child, 0) for i, of_child in enumerate(kind))
        else:
            rows.append(_Part(0, name, name, kind, 0))
    return rows


COT_LAYER = _parts(
    key_embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
    embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.GroupNorm],
    conv1x1=[nn.Conv2d, nn.BatchNorm2d],
    bn=nn.BatchNorm2d,
    act=nn.SiLU,
    se=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d],
)
BOTTLENECK = _parts(  # the others are called
    conv1=nn.Conv2d, bn1=nn.BatchNorm2d, drop_block=nn.Identity, act1=nn.ReLU, conv3=nn.Conv2d, bn3=nn.BatchNorm2d,
    act3=nn.ReLU)
DOWNSAMPLE = _parts(downsample=[nn.Conv2d, nn.BatchNorm2d])  # of a bottleneck in training; another one is called
FOLDED_COT_LAYER = _parts(
    key_embed=[nn.Conv2d, nn.ReLU],
    query=nn.Conv2d,
    key=nn.Conv2d,
    embed=[nn.ReLU, nn.Conv2d, nn.GroupNorm],
    value=nn.Conv2d,
    act=nn.SiLU,
    se=[nn.Conv2d, nn.ReLU, nn.Conv2d],
)
FOLDED_BOTTLENECK = _parts(conv1=nn.Conv2d, act1=nn.ReLU, conv3=nn.Conv2d, act3=nn.ReLU)
FOLDED_STEMS = {  # by the number of children
    count: _parts(**{str(i): (nn.Conv2d, nn.ReLU)[i % 2] for i in range(count)}) for count in (2, 6)}
COT_ATTENTION = _parts(
    key_embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
    value_embed=[nn.Conv2d, nn.BatchNorm2d],
    attention_embed=[nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d],
)


def find(module: nn.Module, parts: List[_Part], like: Optional[Tensor], any_float: bool = False) -> Found:
    """The parts of a module by their paths, or why they are not what a stand-in knows.

    Each has exactly its type, no hooks and no forward of its own. All parameters are plain tensors, like the one given
    if there is one; if any_float in any floating dtype.
    """
    # the parts of a layer are looked at before each pass: by way of dictionaries, as `nn.Module.__getattr__` is slow
    if are_all_watched() or is_patched(module):
        return 'hooks watch all modules, or a method of all or of this one, or a function, is another one'
    found, by_path = [module], {}
    if like is not None:
        dtype, device, is_cpu = like.dtype, like.device, like.is_cpu
    for parent, name, path, kind, size in parts:
        child = found[parent]._modules.get(name)
        if type(child) is not kind:
            return f'{path} is a {type(child).__name__}, not a {kind.__name__}'
        own = child.__dict__  # looked at as by `is_watched`, without its call for each
        if own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks'] \
                or 'forward' in own or '_conv_forward' in own:
            return f'hooks watch {path}, or its forward is another one'
        found.append(child)
        by_path[path] = child
        if size:
            if len(own['_modules']) != size:
                return f'{path} is not a sequence of {size} modules'
            continue
        parameters = own['_parameters']
        if kind is _CONV:
            reason = why_not_conv(own, parameters)
            if reason is not None:
                return f'{path} {reason}'
        elif kind in _WEIGHTED and 'weight' not in parameters:
            return f'{path} {_COMPUTED}'
        if parameters and like is not None:
            for tensor in parameters.values():  # as by `is_plain`, without its call for each
                if tensor is not None and not (
                        type(tensor) in TENSORS and tensor.layout is _STRIDED
                        and (tensor.dtype is dtype or any_float and tensor.dtype in FLOATS)
                        and (tensor.is_cpu if is_cpu else tensor.device == device)):
                    return f'{path} has a parameter that is not a plain {dtype} tensor on {device.type}'
    return by_path


_COMPUTED = 'has a weight that is computed whenever it is read'


def why_not_conv(own: Dict, parameters: Dict[str, Optional[Tensor]]) -> Optional[str]:
    """For the attributes and parameters of an `nn.Conv2d`."""
    size, stride, padding, dilation = own['kernel_size'], own['stride'], own['padding'], own['dilation']
    if own['padding_mode'] != 'zeros' or not type(size) is type(stride) is type(padding) is type(dilation) is tuple:
        return 'does not pad by a number of zeros, or its sizes are no tuples'
    if 'weight' not in parameters:
        return _COMPUTED
    out, bias = own['out_channels'], parameters.get('bias')
    if parameters['weight'].shape != (out, own['in_channels'] // own['groups'], *size) \
            or bias is not None and bias.shape != (out,):
        return 'has filters or a bias of other sizes than it says'
    return None


def is_plain(tensor: Tensor, like: Tensor, any_float: bool = False) -> bool:
    """Whether a tensor is no subclass but a parameter, dense, and on the device and in the dtype of another one."""
    return type(tensor) in TENSORS and tensor.layout == torch.strided \
        and (tensor.dtype == like.dtype or any_float and tensor.dtype in FLOATS) \
        and (tensor.is_cpu if like.is_cpu else tensor.device == like.device)


def has_bias(module: nn.Module) -> bool:
    """Whether a module has a parameter `bias`."""
    return module._parameters.get('bias') is not None
