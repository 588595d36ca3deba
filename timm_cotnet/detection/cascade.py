"""Cascade R-CNN on torchvision's RoI heads: stages that refine the boxes of the stage before.

Paper: `Cascade R-CNN: Delving into High Quality Object Detection` - https://arxiv.org/abs/1712.00726
"""
from typing import Dict, List, Optional, Tuple

import torch
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import boxes as box_ops

__all__ = ['CascadeRoIHeads', 'CascadeStage']


class CascadeStage(RoIHeads):
    """One stage: torchvision's RoI heads, with box head, predictor, matcher and box coder of the stage's own.

    Arguments as of `RoIHeads`; the predictor has to repeat one box for all classes (`ClassAgnosticPredictor`).
    """

    def refine(
            self,
            box_regression: torch.Tensor,
            proposals: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
    ) -> List[torch.Tensor]:
        """Boxes for the next stage, (N, 4) in pixels for each image, detached and inside the image.

        In training, a box that came out empty stays what it was, so that it can be trained on.

        Args:
            box_regression: What the predictor returned for `proposals`, (sum of N, num_classes * 4).
            proposals: Boxes of this stage, (N, 4) for each image.
            image_shapes: Height and width of each image without padding.
        """
        offsets = box_regression[:, :4].detach().to(proposals[0].dtype)
        counts = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(offsets, proposals).reshape(-1, 4).split(counts)
        refined: List[torch.Tensor] = []
        for boxes, before, shape in zip(decoded, proposals, image_shapes):
            boxes = box_ops.clip_boxes_to_image(boxes, shape)
            if self.training:
                whole = (boxes[:, 2:] - boxes[:, :2] >= 1e-2).all(dim=1, keepdim=True)
                boxes = torch.where(whole, boxes, before)
            refined.append(boxes)
        return refined

    def assign(
            self,
            proposals: List[torch.Tensor],
            targets: List[Dict[str, torch.Tensor]],
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Labels (N) and box offsets (N, 4) that the proposals of each image are trained on, at this stage's IoU.

        Args:
            proposals: Boxes of this stage, (N, 4) for each image.
            targets: `boxes` and `labels` of each image.
        """
        gt_boxes = [target['boxes'].to(proposals[0].dtype) for target in targets]
        gt_labels = [target['labels'] for target in targets]
        matched_idxs, labels = self.assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        matched: List[torch.Tensor] = []
        for boxes, idxs in zip(gt_boxes, matched_idxs):
            boxes = boxes if len(boxes) else torch.zeros((1, 4), dtype=boxes.dtype, device=boxes.device)
            matched.append(boxes[idxs])
        return labels, list(self.box_coder.encode(matched, proposals))


class CascadeRoIHeads(RoIHeads):
    """RoI heads in stages, each trained at a higher IoU on the boxes that the stage before it predicts.

    The gradients that the stages send into the features are scaled by one over their number. A detection has the box
    of the last stage and the mean of the stages' scores. Masks are trained on the regions of the first stage and
    predicted for the final boxes. All as in detectron2, losses and post-processing as in torchvision.

    Args:
        stages: Stages, first to last; pooling, sampling and thresholds are those of the first.
        mask_roi_pool: Pooling of regions for masks, or None.
        mask_head: Head on the pooled regions, or None.
        mask_predictor: Predictor of masks, or None.
    """

    def __init__(
            self,
            stages: List[CascadeStage],
            mask_roi_pool: Optional[nn.Module] = None,
            mask_head: Optional[nn.Module] = None,
            mask_predictor: Optional[nn.Module] = None,
    ):
        first, last = stages[0], stages[-1]
        super().__init__(
            first.box_roi_pool, None, None,
            first.proposal_matcher.high_threshold, first.proposal_matcher.low_threshold,
            first.fg_bg_sampler.batch_size_per_image, first.fg_bg_sampler.positive_fraction, last.box_coder.weights,
            first.score_thresh, first.nms_thresh, first.detections_per_img, mask_roi_pool, mask_head, mask_predictor)
        self.stages = nn.ModuleList(stages)

    def forward(
            self,
            features: Dict[str, torch.Tensor],
            proposals: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
            targets: Optional[List[Dict[str, torch.Tensor]]] = None,
    ) -> Tuple[List[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]:
        """As in torchvision; the losses of boxes are named by stage, `loss_classifier_stage0` and so on.

        Args:
            features: Levels of the pyramid, by name.
            proposals: Regions of each image, (N, 4) in pixels.
            image_shapes: Height and width of each image without padding.
            targets: `boxes`, `labels` and perhaps `masks` of each image, in training.
        """
        result: List[Dict[str, torch.Tensor]] = []
        losses: Dict[str, torch.Tensor] = {}
        labels: List[torch.Tensor] = []
        matched_idxs: List[torch.Tensor] = []
        regression_targets: List[torch.Tensor] = []
        if self.training:
            self.check_targets(targets)
            sampled, matched_idxs, labels, encoded = self.stages[0].select_training_samples(proposals, targets)
            proposals, regression_targets = sampled, list(encoded)
        mask_proposals, mask_labels = proposals, labels

        scores: List[torch.Tensor] = []
        class_logits, box_regression = torch.empty(0), torch.empty(0)
        for i, stage in enumerate(self.stages):
            if i > 0 and self.training:
                assert targets is not None
                labels, regression_targets = stage.assign(proposals, targets)
            pooled = self.box_roi_pool(features, proposals, image_shapes)
            pooled = torch.lerp(pooled.detach(), pooled, 1 / len(self.stages))  # scales the gradient alone
            class_logits, box_regression = stage.box_predictor(stage.box_head(pooled))
            scores.append(class_logits.softmax(-1))
            if self.training:
                loss_classifier, loss_box_reg = fastrcnn_loss(class_logits, box_regression, labels, regression_targets)
                losses[f'loss_classifier_stage{i}'] = loss_classifier
                losses[f'loss_box_reg_stage{i}'] = loss_box_reg
            if i + 1 < len(self.stages):
                proposals = stage.refine(box_regression, proposals, image_shapes)

        if not self.training:
            # the softmax that follows gives the mean score back
            mean_logits = torch.stack(scores).mean(0).log()
            boxes, probabilities, labels = self.postprocess_detections(
                mean_logits, box_regression, proposals, image_shapes)
            for i in range(len(boxes)):
                result.append({'boxes': boxes[i], 'labels': labels[i], 'scores': probabilities[i]})
            mask_proposals = boxes
        if self.has_mask():
            if self.training:
                assert targets is not None
                losses['loss_mask'] = self.mask_loss(
                    features, mask_proposals, mask_labels, matched_idxs, image_shapes, targets)
            else:
                logits = self.mask_logits(features, mask_proposals, image_shapes)
                for masks, detections in zip(maskrcnn_inference(logits, labels), result):
                    detections['masks'] = masks
        return result, losses

    def mask_logits(
            self,
            features: Dict[str, torch.Tensor],
            proposals: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
    ) -> torch.Tensor:
        """Logits of the masks of all regions, (N, num_classes, rows, columns)."""
        assert self.mask_roi_pool is not None and self.mask_head is not None and self.mask_predictor is not None
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, proposals, image_shapes)))

    def mask_loss(
            self,
            features: Dict[str, torch.Tensor],
            proposals: List[torch.Tensor],
            labels: List[torch.Tensor],
            matched_idxs: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
            targets: List[Dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        """Loss of the masks of the regions that hold an object."""
        positive = [torch.where(label > 0)[0] for label in labels]
        regions = [boxes[idxs] for boxes, idxs in zip(proposals, positive)]
        matched = [all_idxs[idxs] for all_idxs, idxs in zip(matched_idxs, positive)]
        return maskrcnn_loss(
            self.mask_logits(features, regions, image_shapes), regions, [target['masks'] for target in targets],
            [target['labels'] for target in targets], matched)
