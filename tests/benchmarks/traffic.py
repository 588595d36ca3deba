"""What CoTNet-50 and its rivals do on a GPU, counted without one: `python tests/benchmarks/traffic.py`.

Launches of kernels and bytes read and written, for each kind of operator of a training step (autocast to bfloat16,
forward, backward and SGD with momentum) and of inference (bfloat16, norms folded and not), eager and channels-last; what
the forward keeps for the backward, which is most of the peak memory; and a time predicted from them, with ratios to
ResNet-50. Counts are exact for what is counted (`traffic_counter.py` says
how). The times are not measured: their constants are fitted to a few measurements on one H200, which are printed beside
what is predicted. `--plain` counts networks without the kernels that stand in for their modules, apart from local
convolution. Needs Triton, but no GPU.
"""
import argparse
import collections
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # a checkout is enough, nothing has to be installed

import engines  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from timm.utils import reparameterize_model  # noqa: E402
from traffic_counter import (  # noqa: E402
    BATCH_NORM, CONTEXTS, CONV, COPY, ELEMENTWISE, GROUP_NORM, KINDS, OPTIMIZER, POOL, Event, inference_events,
    training_events)

COT, RESNET, RESNEST = 'cotnet50', 'resnet50', 'resnest50d'
NETWORKS = (COT, RESNET, RESNEST)
TRAINING, INFERENCE, FOLDED = WORKS = 'training step', 'inference', 'inference, folded'
BATCH, SIZE = 256, 224

# One H200, PyTorch 2.11, batch 256, 224 pixels: milliseconds of the GPU, or of the clock where they say so
MEASURED: Dict[Tuple[str, str, bool], Tuple[float, str]] = {  # by network, work, and whether in plain modules
    (COT, TRAINING, True): (109.0, ''),
    (COT, INFERENCE, True): (31.7, 'clock'),
    (COT, FOLDED, True): (35.8, 'clock'),
    (COT, TRAINING, False): (61.8, 'when more was read'),
    (COT, INFERENCE, False): (16.1, 'clock'),
    (COT, FOLDED, False): (12.9, ''),
    (RESNET, TRAINING, True): (53.2, ''),
    (RESNET, INFERENCE, True): (16.6, ''),
    (RESNET, FOLDED, True): (18.9, 'clock'),
    (RESNEST, TRAINING, True): (152.9, 'clock'),
    (RESNEST, INFERENCE, True): (46.3, 'clock'),
}

BANDWIDTH = 4.3e12  # bytes a second, measured: a copy
# The rest is fitted to the times of kernels on that machine. An operator takes `LAUNCH` for each launch, and its bytes
# at a part of the bandwidth: that of its name if it is here, else that of its kind. Convolutions take the time of their
# operations if that is more.
RATE = 700e12  # operations of a convolution a second
LAUNCH = 2e-6  # seconds
SLOW_LAUNCHES = {'batch_norm_kernel': 6.5e-6, 'batch_norm_backward_kernel': 6.4e-6}  # one program after the other waits
EFFICIENCY = {
    CONV: 0.55,
    BATCH_NORM: 0.44,
    'batch norm in evaluation': 0.6,
    ELEMENTWISE: 0.9,
    'bias of a convolution': 0.35,
    COPY: 0.45,
    POOL: 0.25,
    'max_pool2d_with_indices_backward': 0.17,
    'avg_pool2d': 0.08,
    'avg_pool2d_backward': 0.05,
    'avg_pool_kernel': 0.5,
    GROUP_NORM: 0.5,
    OPTIMIZER: 0.6,
    CONTEXTS: 0.5,
    'local_conv (operator)': 0.38,
    'local_conv_input_grad (operator)': 0.24,
    'local_conv_weight_grad (operator)': 0.24,
    'moments_kernel': 0.5,
    'norm_act_kernel': 0.82,
    'grad_sums_kernel': 0.79,
    'norm_backward_kernel': 0.85,
    'local_conv_kernel': 0.226,
    'dynamic_context_kernel': 0.405,
    'value_grad_kernel': 0.344,
    'filter_grad_kernel': 0.275,
    'pool_kernel': 0.61,
    'mix_kernel': 0.75,
    'mix_sums_kernel': 0.46,
    'mix_backward_kernel': 0.71,
}


class Total(NamedTuple):
    """Sums over events."""
    launches: int
    read: int
    written: int
    flops: int
    milliseconds: float

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def cells(self) -> str:
        return (f'{self.launches} | {self.read / 1e9:.2f} | {self.written / 1e9:.2f} | {self.flops / 1e12:.2f} | '
                f'{self.milliseconds:.2f}')


def milliseconds(event: Event) -> float:
    """What an operator is predicted to take."""
    efficiency = EFFICIENCY.get(event.name, EFFICIENCY[event.kind])
    busy = max(event.bytes / (efficiency * BANDWIDTH), event.flops / RATE)
    return 1e3 * (busy + event.launches * SLOW_LAUNCHES.get(event.name, LAUNCH))


def total(events: List[Event]) -> Total:
    return Total(*(sum(getattr(e, name) for e in events) for name in Total._fields[:4]), sum(map(milliseconds, events)))


def count(name: str, work: str, batch: int, size: int, plain: bool = False) -> Tuple[List[Event], int]:
    """What a network does, and the bytes that its forward keeps for the backward."""
    net = timm.create_model(name)
    x = torch.empty(batch, 3, size, size, device='meta').contiguous(memory_format=torch.channels_last)
    if work == TRAINING:
        net = net.to(memory_format=torch.channels_last).to('meta')
        return training_events(net, x, torch.empty(batch, dtype=torch.long, device='meta'), plain)
    net.eval()
    if work == FOLDED:
        net = reparameterize_model(net) if 'cotnet' in name else engines.fold(net)
    net = net.to(dtype=torch.bfloat16, memory_format=torch.channels_last).to('meta')
    return inference_events(net, x.bfloat16(), plain), 0


def print_table(title: str, events: List[Event], operators: bool) -> None:
    print(f'\n### {title}\n')
    print('| kind | launches | GB read | GB written | Tflop | predicted ms |')
    print('| --- | --- | --- | --- | --- | --- |')
    for kind in KINDS:
        found = [e for e in events if e.kind == kind]
        if not found:
            continue
        print(f'| {kind} | {total(found).cells} |')
        if operators:
            names = collections.defaultdict(list)
            for event in found:
                names[event.name].append(event)
            rows = [(total(same), name) for name, same in names.items()]
            for row, name in sorted(rows, key=lambda pair: -pair[0].milliseconds):
                print(f'| - `{name}` | {row.cells} |')
    print(f'| all | {total(events).cells} |')


def print_summary(
        totals: Dict[Tuple[str, str], Total], kept: Dict[Tuple[str, str], int], plain: bool, comparable: bool) -> None:
    """Totals, and ratios to ResNet-50 at the same work; of folded networks also to one that is not folded."""
    print('\n### Totals, and ratios to ResNet-50\n')
    print('| work | network | launches | GB | predicted ms | measured ms | launches ratio | bytes ratio | time ratio | '
          'to one not folded | GB kept | kept ratio |')
    print('|' + ' --- |' * 12)
    for (work, name), row in totals.items():
        found = MEASURED.get((name, work, plain or 'cotnet' not in name)) if comparable else None
        measured = ''
        if found is not None:
            value, remark = found
            measured = ', '.join(filter(None, [f'{value} ({row.milliseconds / value - 1:+.0%})', remark]))
        ratios, other = [''] * 6, totals.get((work, RESNET))
        if other is not None:
            ratios[:3] = (f'{ours / theirs:.2f}' for ours, theirs in (
                (row.launches, other.launches), (row.bytes, other.bytes), (row.milliseconds, other.milliseconds)))
        if work == FOLDED and (INFERENCE, RESNET) in totals:
            ratios[3] = f'{row.milliseconds / totals[INFERENCE, RESNET].milliseconds:.2f}'
        if kept[work, name]:
            ratios[4] = f'{kept[work, name] / 1e9:.2f}'
            ratios[5] = f'{kept[work, name] / kept[work, RESNET]:.3f}' if other is not None else ''
        print(f'| {work} | {name} | {row.launches} | {row.bytes / 1e9:.1f} | {row.milliseconds:.1f} | {measured} | '
              f'{" | ".join(ratios)} |')


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plain', action='store_true', help='plain modules, with local convolution as one operator')
    parser.add_argument('--networks', nargs='+', default=NETWORKS, metavar='NAME')
    parser.add_argument('--works', nargs='+', default=WORKS, choices=WORKS, metavar='WORK', help=', '.join(WORKS))
    parser.add_argument('--batch', type=int, default=BATCH)
    parser.add_argument('--size', type=int, default=SIZE, help='pixels of a side')
    parser.add_argument('--operators', action='store_true', help='a row for each operator and kernel as well')
    args = parser.parse_args(argv)
    print(f'Batch {args.batch}, {args.size} pixels, bfloat16, channels-last, eager; '
          f'{"plain modules" if args.plain else "with the kernels of this package"}; PyTorch {torch.__version__}.')
    print(
        f'Launches and bytes are counted. Predicted times are fitted: each operator takes {1e6 * LAUNCH:g} us for a '
        f'launch and moves its bytes at a part of {BANDWIDTH / 1e12:g} TB/s that is fitted to kernels measured on one '
        f'H200, or computes at {RATE / 1e12:g} Tflop/s if that takes longer. They are times of the GPU, not of a host '
        f'that may be slower. CoTNet-50 and ResNet-50 were among what was fitted, so it proves nothing that predicted '
        f'and measured agree there; other networks were not.')
    totals, kept = {}, {}
    for work in args.works:
        for name in args.networks:
            events, kept[work, name] = count(name, work, args.batch, args.size, args.plain)
            totals[work, name] = total(events)
            print_table(f'{name}, {work}', events, args.operators)
    print_summary(totals, kept, args.plain, (args.batch, args.size) == (BATCH, SIZE))


if __name__ == '__main__':
    main()
