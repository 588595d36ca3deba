"""COCO's average precision of detectors, computed by faster-coco-eval."""
from typing import Any, Dict, Iterable, List

import torch
from torch import distributed, nn

from .data import CocoDataset

__all__ = ['average_precision', 'coco_results', 'evaluate']

STATISTICS = ('AP', 'AP50', 'AP75')  # the first three that COCO's evaluation computes


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, dataset: CocoDataset, device: torch.device) -> Dict[str, float]:
    """Average precision of a detector on a data set; every process evaluates its own share of the images.

    Args:
        model: Detector with torchvision's calling convention.
        loader: Yields lists of images (3, H, W), uint8, and lists of targets with their image_id.
        dataset: The annotations.
        device: Where the model is.

    Returns:
        `box_AP`, `box_AP50`, `box_AP75` in 0 ... 1 and the same with `mask_` where the data set has masks; -1 where
        there is nothing to be found. Complete in the process of rank 0, empty in others.
    """
    model.eval()
    results: List[Dict[str, Any]] = []
    for images, targets in loader:
        outputs = model([image.to(device) / 255 for image in images])
        for target, output in zip(targets, outputs):
            results += coco_results(target['image_id'], output, dataset)
    if distributed.is_initialized():
        gathered = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
        distributed.gather_object(results, gathered)
        if gathered is None:
            return {}
        results = [result for part in gathered for result in part]
    return average_precision(dataset, results)


def coco_results(image_id: int, output: Dict[str, torch.Tensor], dataset: CocoDataset) -> List[Dict[str, Any]]:
    """Predictions for one image in COCO's format of results.

    Args:
        image_id: The image's id.
        output: What torchvision's detectors return for an image: boxes, labels, scores, perhaps masks.
        dataset: Has the category of each label; labels that have none are left out.
    """
    from faster_coco_eval.core import mask

    boxes = output['boxes'].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        dict(image_id=image_id, category_id=dataset.category_of.get(label), bbox=box, score=score)
        for label, box, score in zip(output['labels'].tolist(), boxes.tolist(), output['scores'].tolist())]
    if dataset.masks:
        for result, soft in zip(results, output['masks'].cpu()):
            result['segmentation'] = mask.encode((soft[0] > 0.5).numpy().astype('uint8', order='F'))
    return [result for result in results if result['category_id'] is not None]


def average_precision(dataset: CocoDataset, results: List[Dict[str, Any]]) -> Dict[str, float]:
    """Average precision of results in COCO's format.

    Args:
        dataset: The annotations.
        results: Predictions for the images of the data set.

    Returns:
        As `evaluate`.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    kinds = dict(box='bbox', mask='segm') if dataset.masks else dict(box='bbox')
    found = {}
    for name, kind in kinds.items():
        truth = COCO(dataset.truth())
        evaluation = COCOeval_faster(truth, truth.loadRes([dict(result) for result in results]), kind)
        evaluation.run()
        found.update((f'{name}_{statistic}', round(float(value), 4))
                     for statistic, value in zip(STATISTICS, evaluation.stats))
    return found
