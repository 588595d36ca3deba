"""An iteration of training a Faster R-CNN, CoTNet-50 against ResNet-50: `python tests/benchmarks/detection.py`.

Both have the same pyramid, heads and norms, random weights and the same images, drawn once, with eight boxes each; they
take turns, and medians are compared. Prints the table.
"""
import argparse
import statistics
import time
from typing import Dict, List, Optional

import torch
from engines import hardware

from timm_cotnet.detection import fasterrcnn_cotnet_fpn

BACKBONES = ('cotnet50', 'resnet50')
GOAL = 1.25


def images_and_targets(batch: int, size: int):
    """Noise, and boxes anywhere on it."""
    generator = torch.Generator().manual_seed(0)
    corners = size * torch.rand(batch, 8, 2, generator=generator) * 0.5
    sides = size * (0.1 + 0.4 * torch.rand(batch, 8, 2, generator=generator))
    targets = [dict(boxes=boxes, labels=torch.arange(1, 9)) for boxes in torch.cat([corners, corners + sides], 2)]
    return list(torch.rand(batch, 3, size, size, generator=generator)), targets


def measure(batch: int, size: int, regions: int, seconds: float, channels_last: bool) -> Dict[str, float]:
    """Median milliseconds of an iteration with so many regions in each image, by backbone."""
    images, targets = images_and_targets(batch, size)
    steps = {}
    for name in BACKBONES:
        model = fasterrcnn_cotnet_fpn(
            name, weights_backbone=None, min_size=size, max_size=size, box_batch_size_per_image=regions).train()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        steps[name] = model, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    times: Dict[str, List[float]] = {name: [] for name in BACKBONES}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or min(map(len, times.values())) < 3:
        for name, (model, optimizer) in steps.items():
            torch.manual_seed(0)  # the same proposals are drawn
            start = time.perf_counter()
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[320, 512], help='sides of the images')
    parser.add_argument('--batch', type=int, default=2, help='images of an iteration')
    parser.add_argument('--regions', type=int, default=512, help='regions of an image that train the box head')
    parser.add_argument('--seconds', type=float, default=40., help='for each row')
    args = parser.parse_args(argv)
    print(hardware())
    print('\n| Faster R-CNN, training iteration | CoTNet-50 | ResNet-50 | ratio | goal |')
    print('| --- | --- | --- | --- | --- |')
    for size in args.sizes:
        for channels_last in (False, True):
            ours, other = measure(args.batch, size, args.regions, args.seconds, channels_last).values()
            layout = 'channels-last' if channels_last else 'contiguous'
            print(f'| batch {args.batch}, {size} x {size}, {layout} | {ours:.0f} ms | {other:.0f} ms '
                  f'| {ours / other:.2f} | at most {GOAL} |', flush=True)


if __name__ == '__main__':
    main()
