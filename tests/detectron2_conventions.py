"""A detector's inference in plain PyTorch, by detectron2's conventions and under its names of weights.

Written from its documentation (`modeling`, `Box2BoxTransform`, `DefaultAnchorGenerator`, `ROIPooler`,
`CascadeROIHeads`): boxes are x1, y1, x2, y2; classes are 0, 1, ... and the background is last.
"""
import math

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, roi_align

STRIDES = (4, 8, 16, 32, 64)


def cell_anchors(size):
    """Anchors of one area around zero; aspect ratios are height to width."""
    rows = []
    for ratio in (0.5, 1.0, 2.0):
        width = math.sqrt(size * size / ratio)
        height = ratio * width
        rows.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(rows)


def grid_anchors(rows, columns, stride, size):
    """Anchors of a level, row by row, all of a place together; the first place is at zero."""
    places = [(column * stride, row * stride) for row in range(rows) for column in range(columns)]
    shifts = torch.tensor([[x, y, x, y] for x, y in places], dtype=torch.float32)
    return (shifts[:, None] + cell_anchors(size)[None]).reshape(-1, 4)


def apply_deltas(deltas, boxes, weights):
    """Boxes moved and scaled by deltas; the scaling is limited to 1000 / 16."""
    size = boxes[:, 2:] - boxes[:, :2]
    center = boxes[:, :2] + size / 2
    move = deltas[:, :2] / torch.tensor(weights[:2])
    scale = (deltas[:, 2:] / torch.tensor(weights[2:])).clamp(max=math.log(1000 / 16))
    center, size = center + move * size, size * scale.exp()
    return torch.cat([center - size / 2, center + size / 2], 1)


def clip(boxes, shape):
    height, width = shape
    return torch.stack([
        boxes[:, 0].clamp(0, width), boxes[:, 1].clamp(0, height),
        boxes[:, 2].clamp(0, width), boxes[:, 3].clamp(0, height)], 1)


def pool(levels, boxes, size):
    """Each box from the level of its area, 224 pixels from the fourth, without a shift of half a pixel."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    chosen = torch.floor(4 + torch.log2(areas.sqrt() / 224 + 1e-8)).clamp(2, 5)
    pooled = torch.zeros(len(boxes), levels[0].shape[1], size, size)
    for level, (feature, stride) in enumerate(zip(levels[:4], STRIDES), 2):
        places = torch.where(chosen == level)[0]
        pooled[places] = roi_align(feature, [boxes[places]], size, 1 / stride, sampling_ratio=0, aligned=True)
    return pooled


class Detectron2:
    """A detector made of detectron2's weights.

    Args:
        state_dict: Weights under detectron2's names.
        image_shape: Height and width of the image without padding.
        score_thresh: Least score of a detection.
        proposals: Number of proposals.
    """

    def __init__(self, state_dict, image_shape, score_thresh, proposals):
        self.weights, self.shape, self.score_thresh, self.proposals = state_dict, image_shape, score_thresh, proposals

    def conv(self, x, name, padding=0):
        weights = self.weights
        x = F.conv2d(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'), padding=padding)
        if f'{name}.norm.weight' in weights:
            norm = [weights[f'{name}.norm.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias')]
            x = F.batch_norm(x, *norm, eps=1e-5)
        return x

    def linear(self, x, name):
        return F.linear(x, self.weights[f'{name}.weight'], self.weights[f'{name}.bias'])

    def pyramid(self, features):
        """p2 to p6 of the features res2 to res5."""
        levels, above = [], None
        for stage, feature in reversed(list(enumerate(features, 2))):
            lateral = self.conv(feature, f'backbone.fpn_lateral{stage}')
            above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2.0, mode='nearest')
            levels.insert(0, self.conv(above, f'backbone.fpn_output{stage}', padding=1))
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]

    def propose(self, levels):
        boxes, scores, numbers = [], [], []
        for number, (feature, stride, size) in enumerate(zip(levels, STRIDES, (32, 64, 128, 256, 512))):
            rows, columns = feature.shape[2:]
            hidden = F.relu(self.conv(feature, 'proposal_generator.rpn_head.conv', padding=1))
            logits = self.conv(hidden, 'proposal_generator.rpn_head.objectness_logits')
            deltas = self.conv(hidden, 'proposal_generator.rpn_head.anchor_deltas')
            logits = logits[0].permute(1, 2, 0).reshape(-1)
            deltas = deltas[0].view(3, 4, rows, columns).permute(2, 3, 0, 1).reshape(-1, 4)
            best = logits.topk(min(1000, len(logits))).indices
            anchors = grid_anchors(rows, columns, stride, size)
            boxes.append(clip(apply_deltas(deltas[best], anchors[best], (1., 1., 1., 1.)), self.shape))
            scores.append(logits[best])
            numbers.append(torch.full((len(best),), number))
        boxes, scores, numbers = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
        whole = ((boxes[:, 2:] - boxes[:, :2]) > 1e-3).all(1)
        boxes, scores, numbers = boxes[whole], scores[whole], numbers[whole]
        return boxes[batched_nms(boxes, scores, numbers, 0.7)[:self.proposals]]

    def box_head(self, pooled, stage):
        for i in range(1, 5):
            pooled = F.relu(self.conv(pooled, f'roi_heads.box_head.{stage}conv{i}', padding=1))
        hidden = F.relu(self.linear(pooled.flatten(1), f'roi_heads.box_head.{stage}fc1'))
        names = (f'roi_heads.box_predictor.{stage}{part}' for part in ('cls_score', 'bbox_pred'))
        return [self.linear(hidden, name) for name in names]

    def detect(self, features):
        """Boxes (N, 4), scores (N), classes (N) and masks (N, 28, 28) or None of one image."""
        levels = self.pyramid(features)
        boxes = self.propose(levels)
        if 'roi_heads.box_head.0.fc1.weight' in self.weights:
            scores = []
            for stage, weights in enumerate(((10., 10., 5., 5.), (20., 20., 10., 10.), (30., 30., 15., 15.))):
                logits, deltas = self.box_head(pool(levels, boxes, 7), f'{stage}.')
                scores.append(logits.softmax(1))
                boxes = clip(apply_deltas(deltas, boxes, weights), self.shape)
            scores = sum(scores) / 3
            classes = scores.shape[1] - 1
            boxes = boxes[:, None].expand(-1, classes, 4)
        else:
            logits, deltas = self.box_head(pool(levels, boxes, 7), '')
            scores = logits.softmax(1)
            classes = scores.shape[1] - 1
            boxes = torch.stack([
                clip(apply_deltas(deltas[:, 4 * i:4 * i + 4], boxes, (10., 10., 5., 5.)), self.shape)
                for i in range(classes)], 1)
        scores = scores[:, :classes]
        rows, labels = torch.where(scores > self.score_thresh)
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        kept = batched_nms(boxes, scores, labels, 0.5)[:100]
        kept = kept[(boxes[kept, 2:] > boxes[kept, :2]).all(1)]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        return boxes, scores, labels, self.masks(levels, boxes, labels)

    def masks(self, levels, boxes, labels):
        if 'roi_heads.mask_head.predictor.weight' not in self.weights:
            return None
        hidden = pool(levels, boxes, 14)
        for i in range(1, 5):
            hidden = F.relu(self.conv(hidden, f'roi_heads.mask_head.mask_fcn{i}', padding=1))
        name = 'roi_heads.mask_head.deconv'
        hidden = F.relu(F.conv_transpose2d(hidden, self.weights[f'{name}.weight'], self.weights[f'{name}.bias'], 2))
        logits = self.conv(hidden, 'roi_heads.mask_head.predictor')
        return logits[torch.arange(len(labels)), labels].sigmoid()
