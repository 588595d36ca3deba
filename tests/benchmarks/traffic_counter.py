"""Counts what a network does on a GPU, without one: launches of kernels, and bytes that each operator reads and writes.

Tensors are on the meta device, so nothing is computed. A dispatch mode sees the operators of PyTorch, and a recorder
stands in for the launch of this package's Triton kernels. An input counts once for each pass that a kernel makes over
it, an output once; what a cache holds is not known.
"""
import contextlib
import importlib
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_cotnet.ops import dispatch

CONV, BATCH_NORM, ELEMENTWISE, COPY = 'convolution, matrix product', 'batch norm', 'element-wise', 'copy, cast'
POOL, GROUP_NORM, CONTEXTS, OPTIMIZER = 'pooling', 'group norm', 'local convolution, contexts', 'optimizer'
KINDS = (CONV, BATCH_NORM, ELEMENTWISE, COPY, POOL, GROUP_NORM, CONTEXTS, OPTIMIZER)

# Of each Triton kernel, what it reads and what it writes: the names of its pointers without `_ptr`. `a:FLAG` is touched
# only where the constant FLAG holds, `a!FLAG` only where it does not; else it stands for nothing.
# Rows above and below that a local convolution reads again are in the cache. Tables of channels count as well.
KERNELS = {
    'moments_kernel': ('x', 'moments'),
    'batch_norm_kernel': (
        'moments weight bias running_mean running_var tracked', 'running_mean running_var tracked table'),
    'running_norm_kernel': ('mean var weight bias', 'table'),
    'norm_act_kernel': ('x residual:RESIDUAL table', 'out'),
    'grad_sums_kernel': ('grad x out:RESIDUAL table', 'sums passed:RESIDUAL'),
    'batch_norm_backward_kernel': ('sums weight table', 'factors'),
    'norm_backward_kernel': ('grad x table:RELU factors', 'grad_x'),
    'avg_pool_kernel': ('x', 'out'),
    'transpose_kernel': ('x', 'out'),
    'fold_layer_kernel': (
        'key first attn value ' + ' '.join(
            f'{norm}_{part}' for norm in ('key', 'first', 'value', 'norm', 'se')
            for part in ('mean', 'var', 'weight', 'bias')), 'out table'),
    'fold_block_kernel': (
        'conv1 mean1 var1 weight1 bias1 conv3 mean3 var3 weight3 bias3 '
        'shortcut:SHORTCUT mean:SHORTCUT var:SHORTCUT weight:SHORTCUT bias:SHORTCUT', 'out'),
    'order_filters_kernel': ('attn', 'out'),
    'to_matrices_kernel': (
        'key first attn value', 'key_matrix of_query of_key attn_matrix value_matrix'),
    'from_matrices_kernel': (
        'key_matrix of_query of_key attn_matrix value_matrix image_sums', 'key first attn value sums'),
    'filter_norm_kernel': ('moments conv_bias weight bias', 'table means'),
    'filter_table_kernel': ('logits conv_bias weight bias', 'table'),
    'filter_norm_backward_kernel': ('sums weight table means', 'factors grads'),
    'local_conv_kernel': ('value logits value_table filter_table', 'out moments'),
    'dynamic_context_kernel': ('value logits static value_table:NORMED filter_table table', 'out pooled'),
    'value_grad_kernel': ('grad logits value value_table filter_table', 'out sums'),
    'filter_grad_kernel': ('grad value value_table', 'out'),
    'pool_kernel': ('out static table', 'pooled'),
    'mix_kernel': ('out static attn table!DYNAMIC', 'mixed'),
    'product_kernel': ('x y bias', 'out'),
    'attend_kernel': ('pooled weight1 bias1 table:NORMED weight2 bias2', 'attn'),
    'train_attend_kernel': (
        'run_sums weight1 bias1 weight bias running_mean running_var tracked',
        'running_mean running_var tracked pooled normed hidden x_scale'),
    'train_attend_backward_kernel': ('grad weight2 hidden normed weight x_scale', 'grad_x grads'),
    'mix_sums_kernel': ('grad out static table', 'sums'),
    'attn_grad_kernel': ('run_sums attn', 'sums grad_attn'),
    'mixed_norm_backward_kernel': ('sums attn grad_attn grad_pooled weight table', 'factors'),
    'mix_backward_kernel': ('grad out attn grad_pooled table factors', 'grad_static grad_out'),
}
_KERNEL_KINDS = {
    **dict.fromkeys(
        ('moments_kernel', 'batch_norm_kernel', 'running_norm_kernel', 'norm_act_kernel', 'grad_sums_kernel',
         'batch_norm_backward_kernel', 'norm_backward_kernel'), BATCH_NORM),
    **dict.fromkeys(('filter_norm_kernel', 'filter_table_kernel', 'filter_norm_backward_kernel'), GROUP_NORM),
    **dict.fromkeys(('to_matrices_kernel', 'from_matrices_kernel', 'transpose_kernel'), COPY),
    'avg_pool_kernel': POOL,
    **dict.fromkeys(('fold_layer_kernel', 'fold_block_kernel', 'order_filters_kernel'), COPY),
}
_KINDS = {
    **dict.fromkeys(
        ('convolution', 'convolution_backward', 'mm', 'addmm', 'addmm_', 'bmm', '_addmm_activation',
         'cudnn_convolution_relu', 'cudnn_convolution_add_relu'), CONV),
    **dict.fromkeys(('native_batch_norm', 'native_batch_norm_backward', 'batch norm in evaluation'), BATCH_NORM),
    **dict.fromkeys(('native_group_norm', 'native_group_norm_backward'), GROUP_NORM),
    **dict.fromkeys(('_to_copy', 'copy_', 'clone', 'cat', 'stack', 'constant_pad_nd'), COPY),
    **dict.fromkeys(
        ('max_pool2d_with_indices', 'max_pool2d_with_indices_backward', 'avg_pool2d', 'avg_pool2d_backward'), POOL),
}
_NOTHING = ('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'detach', '_unsafe_view',
            'lift_fresh')
_WRITE_ONLY = ('zero_', 'zeros', 'zeros_like', 'new_zeros', 'ones_like', 'fill_', 'full', 'full_like')
# of which the first pass gathers statistics, or sums for a gradient, and the second reads the same again
_READ_TWICE = {'native_batch_norm': 1, 'native_batch_norm_backward': 2, 'native_group_norm': 1,
               'native_group_norm_backward': 2}
_LAUNCHES = {'native_batch_norm': 3, 'native_batch_norm_backward': 2, 'native_group_norm': 3,
             'native_group_norm_backward': 5}
_TENSORS_OF_A_LAUNCH = (110, 64, 48, 36)  # of `_foreach` operators with one to four lists
_BLOCKS_OF_A_LAUNCH, _BLOCK = 320, 65536


class Event(NamedTuple):
    """What one operator or kernel does."""
    name: str
    kind: str
    launches: int
    read: int  # bytes
    written: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


def size_of(tensor: Optional[Tensor]) -> int:
    """Bytes of the elements that a tensor has in memory: those of an expanded axis are one."""
    if tensor is None:
        return 0
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        size *= length if stride or not length else 1
    return size


class Counter(TorchDispatchMode):
    """Adds an event to `events` for each operator of PyTorch that launches something.

    Results get the memory format that they have on a GPU, which is not always that of meta tensors.
    """

    def __init__(self):
        super().__init__()
        self.events: List[Event] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.partition('.')[0]
        out = _run(func, name, args, kwargs)
        if func.is_view or name in _NOTHING or func.namespace == 'profiler':
            return out
        if func.namespace == 'timm_cotnet':
            self._add(f'{name} (operator)', CONTEXTS, args[:2], [out])
        elif name.startswith('_foreach'):
            self._foreach(name, args, kwargs, out)
        elif name in ('convolution', 'convolution_backward'):
            self._convolution(name, args, out)
        else:
            self._operator(name, args, kwargs, out)
        return out

    def _add(self, name: str, kind: str, read: Sequence, written: Sequence, launches: int = 1, flops: int = 0) -> None:
        self.events.append(
            Event(name, kind, launches, sum(map(size_of, read)), sum(map(size_of, written)), flops))

    def _operator(self, name: str, args: Sequence, kwargs: Dict[str, Any], out: Any) -> None:
        tensors = _tensors((args, {key: value for key, value in kwargs.items() if key != 'out'}))
        read = [] if name in _WRITE_ONLY else tensors[1:] if name == 'copy_' else tensors
        launches = _LAUNCHES.get(name, 1)
        if name == 'native_batch_norm' and not args[5]:
            name, launches = 'batch norm in evaluation', 1
        read = read + tensors[:_READ_TWICE.get(name, 0)]
        flops = 0
        if name in ('mm', 'addmm', 'addmm_', 'bmm', '_addmm_activation'):
            a, b = [t for t in tensors if t.ndim > 1][-2:]
            flops = 2 * a.numel() * b.shape[-1]
        elif name.startswith('cudnn'):
            flops = _convolution_flops(out, args[1])
        self._add(name, _KINDS.get(name, ELEMENTWISE), read, _tensors(out), launches, flops)

    def _convolution(self, name: str, args: Sequence, out: Any) -> None:
        """A bias is a pass of its own behind a convolution, and its gradient one before."""
        if name == 'convolution':
            x, weight, bias = args[:3]
            self._add(name, CONV, (x, weight), (out,), 1, _convolution_flops(out, weight))
            if bias is not None:
                self._add('bias of a convolution', ELEMENTWISE, (out, bias), (out,))
            return
        grad, x, weight = args[:3]
        grad_x, grad_weight, grad_bias = out
        if _is_channels_last(x) and not grad.is_contiguous(memory_format=torch.channels_last):
            self._add('gradient to channels-last', COPY, (grad,), (grad,))  # cuDNN wants one format
        flops = _convolution_flops(grad, weight)
        if grad_x is not None:
            self._add('convolution, gradient of input', CONV, (grad, weight), (grad_x,), 1, flops)
        if grad_weight is not None:
            self._add('convolution, gradient of weight', CONV, (grad, x), (grad_weight,), 1, flops)
        if grad_bias is not None:
            self._add('gradient of a bias', ELEMENTWISE, (grad,), (grad_bias,))

    def _foreach(self, name: str, args: Sequence, kwargs: Dict[str, Any], out: Any) -> None:
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        blocks = sum(-(-t.numel() // _BLOCK) for t in lists[0])
        launches = max(
            -(-len(lists[0]) // _TENSORS_OF_A_LAUNCH[min(len(lists), 4) - 1]), -(-blocks // _BLOCKS_OF_A_LAUNCH))
        self._add(name, OPTIMIZER, _tensors(lists), lists[0] if name.endswith('_') else _tensors(out), launches)

    def launch(self, kernel, grid: Tuple[int], *args, **constants) -> None:
        """In place of `ops.gpu.launch.launch`: nothing runs."""
        name = kernel.__name__
        tensors = dict(zip(pointers(kernel), (a for a in args if isinstance(a, Tensor)), strict=True))
        read, written = ([tensors[pointer] for pointer in _touched(names, constants)] for names in KERNELS[name])
        kind = _KERNEL_KINDS.get(name, CONTEXTS)
        if constants.get('TABLE_ROWS') or constants.get('FACTOR_ROWS') \
                or name == 'moments_kernel' and tensors['moments'].ndim == 4:  # of each image: those of the filters
            kind = GROUP_NORM
        self._add(name, kind, read, written)


def _convolution_flops(out: Tensor, weight: Tensor) -> int:
    """Operations of a convolution, and as many of each of its gradients: a product and a sum are two."""
    return 2 * out.numel() * weight[0].numel()


def pointers(kernel) -> List[str]:
    """Names of a Triton kernel's tensors, without `_ptr`."""
    return [name[:-len('_ptr')] for name in kernel.arg_names if name.endswith('_ptr')]


def names_of(text: str) -> List[str]:
    """Those in one column of `KERNELS`, whatever they depend on."""
    return [word.replace('!', ':').partition(':')[0] for word in text.split()]


def _touched(text: str, constants: Dict[str, Any]) -> Iterator[str]:
    for word in text.split():
        name, is_negated, flag = word.partition('!')
        if not is_negated:
            name, _, flag = word.partition(':')
        if not flag or bool(constants[flag]) != bool(is_negated):
            yield name


def _tensors(tree: Any) -> List[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _run(func, name: str, args: Sequence, kwargs: Dict[str, Any]) -> Any:
    """The result of an operator, in channels-last memory if it has images and the operator was given some."""
    if name.startswith('cudnn_convolution'):  # which meta tensors do not have
        x, weight, (stride, padding, dilation, groups) = *args[:2], args[-4:]
        out = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    else:
        out = func(*args, **kwargs)
    if _KINDS.get(name) not in (CONV, BATCH_NORM, POOL) or not any(_is_channels_last(a) for a in _tensors(args)):
        return out
    results = [r.contiguous(memory_format=torch.channels_last) if isinstance(r, Tensor) and r.ndim == 4 else r
               for r in (out if isinstance(out, (tuple, list)) else [out])]
    return tuple(results) if isinstance(out, (tuple, list)) else results[0]


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class Autocast(TorchFunctionMode):
    """What autocast to bfloat16 does, which meta tensors do not have."""
    _DOWN = (torch.conv2d, torch.nn.functional.linear, torch.matmul, Tensor.__matmul__, Tensor.matmul)
    _UP = (torch.nn.functional.group_norm, torch.nn.functional.cross_entropy, torch.softmax, Tensor.softmax,
           torch.nn.functional.softmax, torch.nn.functional.layer_norm)

    def __init__(self, enabled: bool):
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = torch.bfloat16 if func in self._DOWN else torch.float32 if func in self._UP else None
        kwargs = kwargs or {}
        if self.enabled and func in (torch.sum, Tensor.sum):
            kwargs = dict(dict(dtype=torch.float32), **kwargs)
        if self.enabled and dtype is not None:
            args = [_cast(a, dtype) for a in args]
            kwargs = {name: _cast(a, dtype) for name, a in kwargs.items()}
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def switched(self, device_type: str, enabled: bool = True, **_: Any) -> Iterator[None]:
        """In place of `torch.autocast`."""
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    return argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument


@contextlib.contextmanager
def counting(plain: bool = False, autocast: bool = False) -> Iterator[List[Event]]:
    """While it lasts, what networks on the meta device do is added to the list that it gives, as if on a GPU.

    Args:
        plain: Whether no module has a stand-in; local convolution is one operator all the same.
        autocast: Whether to bfloat16.
    """
    counter, casts = Counter(), Autocast(autocast)
    eager = importlib.import_module('timm_cotnet.ops.local_conv')
    with contextlib.ExitStack() as stack:
        def patch(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        for module in (dispatch, dispatch.conditions):
            patch(module, 'is_traced', lambda x: False)  # the counter is a dispatch mode, for which all is plain
            patch(module, 'why_not_triton', lambda x: None)  # there is no device to try a kernel on
        patch(dispatch.conditions, '_why_not_cudnn', lambda x: None)  # there is no cuDNN
        patch(dispatch.conditions, '_has_cudnn', lambda: True)
        table = {} if plain else dispatch._ON_GPU
        patch(dispatch, '_stand_ins', lambda kind, device_type: table.get(kind, ()))  # 'meta' has none
        for name in ('contexts', 'folding', 'images', 'matrices', 'norm', 'pool'):  # each has imported it by its name
            patch(importlib.import_module(f'timm_cotnet.ops.gpu.{name}'), 'launch', counter.launch)
        patch(torch, 'is_autocast_enabled', lambda *_: casts.enabled)  # these four know nothing of 'meta'
        patch(torch, 'set_autocast_enabled', lambda _, enabled: setattr(casts, 'enabled', enabled))
        patch(torch, 'get_autocast_dtype', lambda *_: torch.bfloat16)
        patch(torch, 'autocast', casts.switched)
        patch(eager, '_local_conv_eager', _casting(eager._local_conv_eager, casts))  # it does not cast on 'meta'
        stack.enter_context(casts)
        stack.enter_context(counter)
        yield counter.events


def _casting(local_conv: Callable, casts: Autocast) -> Callable:
    def cast_and_call(x, weight, *args):
        if casts.enabled:
            x, weight = x.bfloat16(), weight.bfloat16()
        return local_conv(x, weight, *args)
    return cast_and_call


def training_events(net: nn.Module, x: Tensor, target: Tensor, plain: bool = False) -> Tuple[List[Event], int]:
    """A step under autocast: forward, backward, SGD with momentum (`foreach`), not the first one.

    Returns:
        The events, and the bytes that are kept from the forward for the backward.
    """
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, foreach=True)
    for parameter in net.parameters():
        optimizer.state[parameter]['momentum_buffer'] = torch.empty_like(parameter)
    with counting(plain, autocast=True) as events, keeping() as kept:
        loss = nn.functional.cross_entropy(net.train()(x), target)
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    with counting(plain) as backward:
        loss.backward()
        optimizer.step()
    return events + backward, sum(storage.nbytes() for storage in kept.values())


@contextlib.contextmanager
def keeping() -> Iterator[Dict[int, torch.UntypedStorage]]:
    """While it lasts, the memory that autograd keeps for the backward is added to what it gives, each storage once."""
    kept: Dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@torch.no_grad()
def inference_events(net: nn.Module, x: Tensor, plain: bool = False) -> List[Event]:
    with counting(plain) as events:
        net.eval()(x)
    return events
