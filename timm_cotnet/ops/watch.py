"""Who looks at what operators and modules do: only where nobody does may something else take the place of a module."""
import types
from typing import Callable, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import DeviceContext

TENSORS = (torch.Tensor, nn.Parameter)
TELLS_EXPORTING = torch.__version__ >= (2, 8)  # from compiling; 2.7 only where `torch.export` is not strict


def is_traced(x: torch.Tensor) -> bool:
    """Whether operators are watched: jit.trace, make_fx, functorch, a mode, a proxy or tensor subclass."""
    return (
        type(x) not in TENSORS
        or torch._C._is_tracing()  # torch.jit.is_tracing, less what surrounds it
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or _are_functions_watched()
    )


def _are_functions_watched() -> bool:
    """Whether a function mode sees what is called; that of a default device only makes tensors."""
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count))


def needs_plain_graph(*tensors: torch.Tensor) -> bool:
    """Whether a graph is being made that needs plain operators: for export, functorch transforms, tensor subclasses.

    PyTorch before 2.8 cannot tell exporting from compiling.
    """
    return torch.compiler.is_compiling() and (
        not TELLS_EXPORTING or is_exporting_program()
        or _is_functorch_active() or _are_functions_watched() or any(type(t) not in TENSORS for t in tensors))


@torch.compiler.assume_constant_result  # the compiler of PyTorch 2.7 to 2.11 takes the answer to be yes
def is_exporting_program() -> bool:
    """Whether `torch.export` makes a graph, as far as this PyTorch can tell."""
    return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # of the graph that is being made
def _is_functorch_active() -> bool:
    return torch._C._are_functorch_transforms_active()


# methods that a call runs, here or of a CoT layer: replaced ones are no part of what something may stand in for
_NAMES = ('forward', '_conv_forward', 'contexts', '_concatenate')
_WRITTEN: List[Tuple[Union[type, types.ModuleType], str, Optional[Callable]]] = []


def as_written(owner: Union[type, types.ModuleType], *names: str) -> None:
    """Remember methods of a class or functions of a module, which programs replace to see or change what all do."""
    for name in names or [name for name in _NAMES if name in owner.__dict__]:
        method = getattr(owner, name)
        module = getattr(method, '__globals__', {}).get('__name__', '')
        known = type(method) is types.BuiltinFunctionType \
            or module.startswith(('torch.', __package__.partition('.')[0]))
        _WRITTEN.append((owner, name, method if known else None))  # None: it was replaced before


as_written(nn.Module, '__call__', '_call_impl')
as_written(nn.Conv2d, 'forward', '_conv_forward')
for _cls in (nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.SiLU, nn.Sequential, nn.Identity):
    as_written(_cls, 'forward')
as_written(F, 'conv2d', 'batch_norm', 'group_norm', 'relu', 'silu', 'avg_pool2d')  # which those call


def are_all_watched() -> bool:
    """Whether hooks see all modules, or methods of whole classes or functions were replaced."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or everywhere._global_backward_hooks \
            or everywhere._global_backward_pre_hooks:
        return True
    for owner, name, method in _WRITTEN:
        if getattr(owner, name) is not method:
            return True
    return False


def is_patched(module: nn.Module) -> bool:
    """Whether a module has methods of its own in place of those of its class."""
    own = module.__dict__
    for name in _NAMES:
        if name in own:
            return True
    return False


def are_watched(modules: List[nn.Module], children: bool = True) -> bool:
    """Whether hooks, or other methods, see what modules and their children get and return."""
    if are_all_watched():
        return True
    modules = list(modules)
    for module in modules:  # grows; by hand, as `modules()` would take longer than a block does
        if module is not None:
            if is_watched(module):
                return True
            if children:
                modules += module._modules.values()
    return False


def is_watched(module: nn.Module) -> bool:
    """Whether hooks of a module itself, or methods of its own, see what it gets and returns."""
    own = module.__dict__
    return bool(
        own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks']
        or is_patched(module))


def untraced(function: Callable) -> Callable:
    """A function that compiled autograd calls instead of looking inside, where it cannot follow kernels."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def wants_plain(*grads: torch.Tensor) -> bool:
    """Whether a backward has to be differentiable plain PyTorch: for a second derivative or many gradients at once."""
    return torch.is_grad_enabled() or any(
        torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_functorch_wrapped_tensor(grad)
        for grad in grads if grad is not None)
