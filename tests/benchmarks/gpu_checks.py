"""What `gpu.py` checks before it measures: that the device computes what the official code and plain PyTorch compute.

Each check gives one line with its numbers, and raises where they are wrong. Convolutions and matrix products are in
full float32 here (no TF32).
"""
import contextlib
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import timm
import torch
import torch.nn.functional as F
from engines import CannotRun, official_local_conv
from torch import nn

from timm_cotnet import CotLayer, CoxtLayer, local_conv
from timm_cotnet.ops.reference import local_conv_reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # golden numbers are a package beside this folder
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


class Check(NamedTuple):
    """What is checked.

    Args:
        name: What it is.
        seconds: What it may take on a GPU, kernels compiled.
        run: Takes the device; returns the line of numbers, raises AssertionError or CannotRun.
    """
    name: str
    seconds: float
    run: Callable[[str], str]


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, and deterministic convolutions."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = False, False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


def shake(module: nn.Module, scale: float = 0.02) -> nn.Module:
    """Noise on every parameter: a new network is all zeros in places."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    assert actual.shape == expected.shape, f'shape {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.isfinite().all(), 'not all numbers are finite'
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def within(differences: Dict[str, float], limit: float) -> str:
    """The differences in words; raises if one is above the limit."""
    text = ', '.join(f'{name} {value:.1e}' for name, value in differences.items()) + f' (at most {limit:.0e})'
    assert all(value <= limit for value in differences.values()), text
    return text


# Golden numbers of the official implementation


def golden_layer(tag: str, layer_type: type, dim: int, device: str) -> str:
    """A layer in float64: output in evaluation and training, gradients."""
    from golden import filled, golden_input, load
    data = load('layers')
    x = golden_input(tuple(data[f'{tag}_eval'].shape), 'layer' + tag).to(device, memory_format=CHANNELS_LAST)
    layer = filled(layer_type(dim)).to(device, memory_format=CHANNELS_LAST)
    with torch.no_grad():
        found = {'eval': difference(layer.eval()(x), data[f'{tag}_eval'])}
    x.requires_grad_()
    out = layer.train()(x)
    out.square().mean().backward()
    norms = torch.stack([parameter.grad.norm() for parameter in layer.parameters()])
    found['train'] = difference(out, data[f'{tag}_train'])
    found['input gradient'] = difference(x.grad, data[f'{tag}_input_grad'])
    found['gradient norms'] = difference(norms, data[f'{tag}_param_grad_norms'])
    return within(found, 1e-9)


def golden_network(name: str, training: bool, device: str) -> str:
    """A network in float32: logits in evaluation; in training also gradients and running statistics."""
    from golden import filled, golden_input, load
    data = load(name)
    net = filled(timm.create_model(name)).float().to(device, memory_format=CHANNELS_LAST)

    def images(*args) -> torch.Tensor:
        return golden_input(*args).float().to(device, memory_format=CHANNELS_LAST)
    with torch.no_grad():
        found = {'logits': difference(net.eval()(images((2, 3, 96, 96), 'input96x96')), data['eval_logits_96x96'])}
    text = within(found, 1e-4)
    if training:  # whose batch norms over few values make much of rounding
        x = images((4, 3, 64, 96), 'inputtrain').requires_grad_()
        logits = net.train()(x)
        (logits * golden_input((4, 1000), 'target').float().to(device)).mean().backward()
        parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
        norms = torch.stack([parameters[key].grad.norm() for key in data['train_grad_names']])
        sums = torch.stack([buffers[key].sum().float() for key in data['train_running_names']])
        found = {'training logits': difference(logits, data['train_logits_64x96'])}
        found['gradient norms'] = difference(norms, data['train_grad_norms'])
        found['input gradient norm'] = difference(x.grad.norm().view(1), data['train_input_grad_norm'].view(1))
        found['running statistics'] = difference(sums, data['train_running_sums'])
        text += '; ' + within(found, 5e-3)
    return text


# Layers against plain PyTorch


def plain_cot_layer(layer: CotLayer, x: torch.Tensor) -> torch.Tensor:
    """What a CoT layer computes, child by child, the local convolution in float64 by the official formula."""
    B, C, H, W = x.shape
    static = layer.key_embed(x)
    both = [x, static.to(x.dtype)]
    filters = layer.embed(torch.cat(both, 1) if layer.groups == 1 else torch.stack(both, 2).flatten(1, 2))
    value = layer.conv1x1(x)
    filters = filters.to(value.dtype).view(B, -1, layer.kernel_size ** 2, H, W)
    parts = zip(value.chunk(layer.groups, 1), filters.chunk(layer.groups, 1))
    operator = official_local_conv if value.dtype == torch.float64 else local_conv_reference
    dynamic = torch.cat([operator(v, f, layer.kernel_size, layer.dilation) for v, f in parts], 1)
    dynamic = layer.act(layer.bn(dynamic))
    attn = layer.se(dynamic.mean((2, 3), keepdim=True) + static.mean((2, 3), keepdim=True))
    attn = attn.view(B, C, 2, 1, 1).softmax(2).to(dynamic.dtype)
    return dynamic * attn[:, :, 0] + static * attn[:, :, 1]


def step(
        layer: CotLayer,
        x: torch.Tensor,
        grad: torch.Tensor,
        run: Callable[[CotLayer, torch.Tensor], torch.Tensor] = lambda layer, x: layer(x),
        autocast: torch.dtype = None,
) -> Dict[str, torch.Tensor]:
    """Output and gradients of one training step of a copy of the layer."""
    layer, x = copy.deepcopy(layer).train(), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        out = run(layer, x)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(out, (x, *parameters.values()), grad.to(out.dtype))
    return {'output': out.detach(), **dict(zip(('x', *parameters), gradients))}


def layer_gradients(
        layer_type: type,
        shape: Tuple[int, int, int, int],
        dtype: torch.dtype,
        autocast: bool,
        memory_format: torch.memory_format,
        device: str,
) -> str:
    """Errors against float64, in multiples of those that plain PyTorch makes in the same precision."""
    torch.manual_seed(1)
    layer = shake(layer_type(shape[1]))
    with torch.no_grad():  # the hidden values of se keep away from zero: rounding would switch a ReLU of so few
        layer.se[1].weight.mul_(0.2)
        layer.se[1].bias.copy_(1 - 2. * (torch.arange(len(layer.se[1].bias)) % 2))
    layer = layer.to(device, memory_format=memory_format)
    x, grad = (torch.randn(shape, device=device).to(dtype).to(memory_format=memory_format) for _ in range(2))
    kwargs = dict(autocast=dtype) if autocast else {}
    if autocast:
        x = x.float()
    else:
        layer = layer.to(dtype)
    exact = step(copy.deepcopy(layer).double(), x.double(), grad.double(), plain_cot_layer)
    plain, ours = (step(layer, x, grad, run, **kwargs) for run in (plain_cot_layer, lambda layer, x: layer(x)))
    largest = max(tensor.norm().item() for name, tensor in exact.items() if name != 'output')
    worst = (0., '', 0.)
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape and ours[name].isfinite().all(), f'{name} is not finite'
        error, allowed = ((other[name].double() - expected).norm().item() for other in (ours, plain))
        size = max(expected.norm().item(), 1e-2 * largest)  # gradients of biases before norms are zero
        allowed += torch.finfo(dtype).eps * size
        worst = max(worst, (error / allowed, name, error / size))
    ratio, name, relative = worst
    text = f'at worst {ratio:.2f} times the error of plain PyTorch (at most 3), in {name} (relative {relative:.1e})'
    assert ratio <= 3, text
    return text


def deterministic(layer_type: type, dim: int, device: str) -> str:
    """Two training steps from the same state give the same bits."""
    dtype = torch.bfloat16
    layer = shake(layer_type(dim)).to(device, dtype, memory_format=CHANNELS_LAST)
    x, grad = (torch.randn(32, dim, 28, 28, device=device, dtype=dtype).to(memory_format=CHANNELS_LAST)
               for _ in range(2))
    step(layer, x, grad)  # kernels are tuned at the first
    first, second = step(layer, x, grad), step(layer, x, grad)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f'differ: {", ".join(different)}'
    return f'{len(first)} tensors equal, bit by bit'


# Networks, large tensors


def graph_of(net: nn.Module, x: torch.Tensor) -> Tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of net(x) and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x)
    return graph, out


def cuda_graph(folded: bool, device: str) -> str:
    """A captured graph, replayed on another input, equals the eager network."""
    _need_cuda(device)
    torch.manual_seed(1)
    net = shake(timm.create_model('cotnet50')).eval()
    net = timm.utils.reparameterize_model(net) if folded else net
    net = net.to(device, torch.bfloat16, memory_format=CHANNELS_LAST)
    first, second = (torch.randn(2, 3, 224, 224, device=device, dtype=torch.bfloat16).to(memory_format=CHANNELS_LAST)
                     for _ in range(2))
    graph, out = graph_of(net, first)
    with torch.no_grad():
        expected = net(second)
    first.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    equal = 'bit by bit' if torch.equal(out, expected) else 'not bit by bit'
    return f'{within({"difference": difference(out, expected)}, 1e-2)}, equal {equal}'


def compiled_training(device: str) -> str:
    """A layer compiled to CUDA graphs against the eager one: output, gradient and running statistics, three steps."""
    _need_cuda(device)
    torch.manual_seed(1)
    layer = shake(CotLayer(64)).to(device, memory_format=CHANNELS_LAST)
    eager, run = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, mode='reduce-overhead')
    found = {}
    for step in range(3):
        x, of_out = (torch.randn(8, 64, 28, 28, device=device).to(memory_format=CHANNELS_LAST) for _ in range(2))
        x.requires_grad_()
        results = []
        for function in (run, eager):
            with torch.autocast(device, torch.bfloat16):
                out = function(x)
            results.append((out.detach().clone(), torch.autograd.grad(out, x, of_out.to(out.dtype))[0].clone()))
        (out, grad), (expected, expected_grad) = results
        found.update({f'step {step}, output': difference(out, expected), 'gradient': difference(grad, expected_grad)})
    found['variance'] = difference(layer.bn.running_var, eager.bn.running_var)
    return within(found, 2e-2)


def far_away(memory_format: torch.memory_format, device: str) -> str:
    """One image of more than 2^31 values: the last rows of the output and of both gradients."""
    _need_cuda(device)
    torch.cuda.empty_cache()
    gigabytes = torch.cuda.mem_get_info()[0] / 2 ** 30
    if gigabytes < 40:
        raise CannotRun(f'{gigabytes:.0f} GiB are free, 40 are needed')
    side, rows, channels, groups = 5800, 6, 64, 8
    # values of [-1, 1): normal ones take a second copy in float32
    x, grad = (torch.empty((1, channels, side, side), device=device, dtype=torch.bfloat16,
                           memory_format=memory_format).uniform_(-1, 1).requires_grad_(i == 0) for i in range(2))
    filters = torch.empty((1, groups * 9, side, side), device=device, dtype=torch.bfloat16,
                          memory_format=memory_format).uniform_(-1, 1).requires_grad_()
    assert x.numel() > 2 ** 31
    out = local_conv(x, filters.view(1, groups, 9, side, side))
    found = dict(zip(('output', 'x', 'filters'), (out, *torch.autograd.grad(out, (x, filters), grad))))
    found = {name: tensor[..., -rows:, :].detach() for name, tensor in found.items()}
    x, filters, grad = (tensor[..., -rows:, :].detach().double() for tensor in (x, filters, grad))
    x.requires_grad_()
    filters.requires_grad_()
    out = official_local_conv(x, filters.view(1, groups, 9, rows, side))
    exact = dict(zip(found, (out, *torch.autograd.grad(out, (x, filters), grad))))
    return within({name: difference(found[name][..., 2:, :], exact[name][..., 2:, :]) for name in found}, 1e-2)


def amp_training(dtype: torch.dtype, device: str) -> str:
    """Ten steps on 32 random images of 64 pixels under autocast, float16 with a GradScaler: the loss falls."""
    if dtype == torch.float16:
        _need_cuda(device)
    torch.manual_seed(1)
    net = timm.create_model('cotnet50', num_classes=10).to(device, memory_format=CHANNELS_LAST).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=1024., enabled=dtype == torch.float16)
    x = torch.randn(32, 3, 64, 64, device=device).to(memory_format=CHANNELS_LAST)
    target, losses = torch.randint(10, (32,), device=device), []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(net(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    text = f'loss {losses[0]:.3f} -> {losses[-1]:.3f} ({" ".join(f"{loss:.2f}" for loss in losses)})'
    assert losses[-1] < 0.8 * losses[0], text
    return text


def _need_cuda(device: str) -> None:
    if device != 'cuda':
        raise CannotRun('needs CUDA')


def all_checks() -> List[Check]:
    """What is checked, in turn: the cheap and telling first."""
    checks = [
        Check('golden numbers, CotLayer, float64', 8, partial(golden_layer, 'cot_dim64_k3', CotLayer, 64)),
        Check('golden numbers, CoxtLayer, float64', 8, partial(golden_layer, 'coxt_dim96_k3', CoxtLayer, 96)),
        Check('golden numbers, cotnet50, float32', 20, partial(golden_network, 'cotnet50', True)),
        Check('golden numbers, cotnext50_2x48d, float32', 12, partial(golden_network, 'cotnext50_2x48d', False)),
        Check('golden numbers, se_cotnetd_50, float32', 8, partial(golden_network, 'se_cotnetd_50', False)),
    ]
    for layer_type, shape, dtype, autocast, memory_format in (
            (CotLayer, (16, 64, 28, 27), torch.bfloat16, True, CHANNELS_LAST),
            (CotLayer, (16, 64, 28, 27), torch.bfloat16, False, CHANNELS_LAST),
            (CotLayer, (16, 64, 28, 27), torch.float16, True, CHANNELS_LAST),
            (CotLayer, (16, 64, 28, 27), torch.float32, False, CHANNELS_LAST),
            (CotLayer, (16, 64, 28, 27), torch.bfloat16, True, CONTIGUOUS),
            (CotLayer, (64, 512, 7, 7), torch.bfloat16, True, CHANNELS_LAST),
            (CoxtLayer, (16, 96, 28, 27), torch.bfloat16, True, CHANNELS_LAST),
            (CoxtLayer, (16, 96, 28, 27), torch.float16, False, CHANNELS_LAST),
            (CoxtLayer, (16, 96, 28, 27), torch.float32, False, CHANNELS_LAST),
    ):
        how = ('autocast ' if autocast else '') + str(dtype).replace('torch.', '')
        layout = 'channels-last' if memory_format is CHANNELS_LAST else 'contiguous'
        checks.append(Check(
            f'gradients, {layer_type.__name__}, {" x ".join(map(str, shape))}, {how}, {layout}', 8,
            partial(layer_gradients, layer_type, shape, dtype, autocast, memory_format)))
    return checks + [
        Check('determinism, CotLayer', 6, partial(deterministic, CotLayer, 128)),
        Check('determinism, CoxtLayer', 6, partial(deterministic, CoxtLayer, 192)),
        Check('CUDA graph, cotnet50', 15, partial(cuda_graph, False)),
        Check('CUDA graph, folded cotnet50', 6, partial(cuda_graph, True)),
        Check('torch.compile, CotLayer in training', 25, compiled_training),
        Check('64-bit offsets, channels-last', 8, partial(far_away, CHANNELS_LAST)),
        Check('64-bit offsets, contiguous', 8, partial(far_away, CONTIGUOUS)),
        Check('mixed precision, bfloat16', 15, partial(amp_training, torch.bfloat16)),
        Check('mixed precision, float16 and GradScaler', 15, partial(amp_training, torch.float16)),
    ]
