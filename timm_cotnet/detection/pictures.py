"""Pictures of what a detector finds."""
from pathlib import Path
from typing import Dict, List

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from .data import CocoDataset

__all__ = ['draw_detections', 'draw_predictions']

SIDE = 360  # pixels of the longer side of each picture
COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#46f0f0', '#f032e6', '#bcf60c', '#008080', '#9a6324')


def draw_detections(
        image: torch.Tensor,
        output: Dict[str, torch.Tensor],
        names: Dict[int, str],
        min_score: float = 0.5,
) -> torch.Tensor:
    """An image with what was found in it.

    Args:
        image: uint8 (3, H, W).
        output: What torchvision's detectors return for it: boxes, labels, scores, perhaps masks.
        names: Names of the labels.
        min_score: Score below which nothing is drawn.

    Returns:
        uint8 (3, h, w), the longer side 360 pixels.
    """
    output = {key: value[output['scores'] >= min_score].cpu() for key, value in output.items()}
    scale = SIDE / max(image.shape[1:])
    size = [max(round(side * scale), 1) for side in image.shape[1:]]
    picture = F.interpolate(image[None].float(), size, mode='bilinear', antialias=True)[0].round().to(torch.uint8)
    labels = output['labels'].tolist()
    if not labels:
        return picture
    colors = [COLORS[label % len(COLORS)] for label in labels]
    if 'masks' in output:
        masks = F.interpolate(output['masks'].float(), size, mode='bilinear')[:, 0] > 0.5
        picture = draw_segmentation_masks(picture, masks, alpha=0.4, colors=colors)
    texts = [f'{names.get(label, label)} {score:.0%}' for label, score in zip(labels, output['scores'].tolist())]
    return draw_bounding_boxes(picture, output['boxes'] * scale, texts, colors=colors, width=2)


@torch.inference_mode()
def draw_predictions(path: Path, model: nn.Module, dataset: CocoDataset, device: torch.device, count: int = 6) -> None:
    """Draws the first images of a data set with what a detector finds in them.

    Args:
        path: PNG file to write.
        model: Detector with torchvision's calling convention, in evaluation mode.
        dataset: The images.
        device: Where the model is.
        count: Number of images.
    """
    pictures: List[torch.Tensor] = []
    for index in range(min(count, len(dataset))):
        image, _ = dataset[index]
        output, = model([image.to(device) / 255])
        picture = draw_detections(image, output, dataset.names)
        pictures.append(F.pad(picture, (0, SIDE - picture.shape[2], 0, SIDE - picture.shape[1]), value=255))
    grid = make_grid(torch.stack(pictures), nrow=3, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path, optimize=True)
