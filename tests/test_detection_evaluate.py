"""Average precision of results whose value is known, and the pictures."""
import pytest
import torch
from PIL import Image

from timm_cotnet.detection.data import CocoDataset, find_split
from timm_cotnet.detection.evaluate import average_precision, evaluate
from timm_cotnet.detection.pictures import SIDE, draw_detections, draw_predictions
from timm_cotnet.detection.shapes import write_shapes

pytest.importorskip('faster_coco_eval', reason='average precision is computed by faster-coco-eval')
PERFECT = {f'{kind}_{name}': 1. for kind in ('box', 'mask') for name in ('AP', 'AP50', 'AP75')}


class Oracle(torch.nn.Module):
    """A detector that knows the answers by the image; `change` makes something else of them."""

    def __init__(self, dataset, change=lambda output: output):
        super().__init__()
        self.items, self.change = list(dataset), change

    def forward(self, images):
        return [self.change(next(as_output(target) for known, target in self.items
                                 if known.shape == image.shape and torch.equal(known / 255, image)))
                for image in images]


def as_output(target):
    plain = {key: value.as_subclass(torch.Tensor) for key, value in target.items() if key != 'image_id'}
    return dict(plain, scores=torch.linspace(0.9, 0.6, len(plain['labels'])), masks=plain['masks'][:, None].float())


def batches(dataset):
    return [([image], [target]) for image, target in dataset]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = write_shapes(tmp_path_factory.mktemp('shapes'), train=1, val=8)
    return CocoDataset(*find_split(folder, 'val'), masks=True)


def test_truth_is_perfect_and_nothing_is_nothing(dataset):
    assert evaluate(Oracle(dataset), batches(dataset), dataset, torch.device('cpu')) == PERFECT
    none = Oracle(dataset, lambda output: {key: value[:0] for key, value in output.items()})
    assert set(evaluate(none, batches(dataset), dataset, torch.device('cpu')).values()) == {0.}
    assert set(average_precision(dataset, [])) == set(PERFECT)


def test_boxes_that_overlap_by_two_thirds_count_at_half(dataset):
    def widen(output):
        boxes = output['boxes'].clone()
        boxes[:, 2] += 0.5 * (boxes[:, 2] - boxes[:, 0])  # intersection over union: 2 / 3
        return dict(output, boxes=boxes)

    found = evaluate(Oracle(dataset, widen), batches(dataset), dataset, torch.device('cpu'))
    assert found['box_AP50'] == 1 and found['box_AP75'] == 0
    assert found['box_AP'] == 0.4  # at 0.5, 0.55, 0.6 and 0.65 of ten thresholds
    assert found['mask_AP'] == 1


def test_other_labels_are_wrong_and_unknown_ones_left_out(dataset):
    wrong = Oracle(dataset, lambda output: dict(output, labels=output['labels'] % 3 + 1))
    assert evaluate(wrong, batches(dataset), dataset, torch.device('cpu'))['box_AP'] < 0.1
    unknown = Oracle(dataset, lambda output: dict(output, labels=output['labels'] + 10))
    assert evaluate(unknown, batches(dataset), dataset, torch.device('cpu'))['box_AP'] == 0


def test_the_other_evaluation_agrees(dataset):
    """The same numbers as pycocotools, where that is installed."""
    reference = pytest.importorskip(
        'pycocotools.cocoeval', reason='pycocotools, with which the numbers are compared, is not installed')
    from pycocotools.coco import COCO
    from timm_cotnet.detection.evaluate import coco_results

    generator = torch.Generator().manual_seed(0)
    results = []
    for _, target in dataset:
        output = as_output(target)
        noise = 6 * torch.randn(output['boxes'].shape, generator=generator)
        output['boxes'], output['scores'] = output['boxes'] + noise, torch.rand(len(noise), generator=generator)
        results += coco_results(target['image_id'], output, dataset)
    found = average_precision(dataset, results)
    truth = COCO()
    truth.dataset = dataset.truth()
    truth.createIndex()
    for name, kind in (('box', 'bbox'), ('mask', 'segm')):
        evaluation = reference.COCOeval(truth, truth.loadRes([dict(result) for result in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected = [found[f'{name}_{statistic}'] for statistic in ('AP', 'AP50', 'AP75')]
        assert evaluation.stats[:3].tolist() == pytest.approx(expected, abs=6e-5)
    assert 0.1 < found['box_AP'] < 0.9


def test_picture_has_the_boxes_in_the_colors_of_their_classes(dataset, tmp_path):
    image = torch.full((3, 90, 180), 255, dtype=torch.uint8)
    output = dict(
        boxes=torch.tensor([[20., 40, 60, 80], [100, 40, 140, 80]]), labels=torch.tensor([1, 2]),
        scores=torch.tensor([0.9, 0.3]), masks=torch.zeros(2, 1, 90, 180))
    output['masks'][0, 0, 50:70, 30:50] = 1
    picture = draw_detections(image, output, {1: 'circle'})
    assert picture.shape == (3, SIDE // 2, SIDE)
    assert picture[:, 159, 80].tolist() == [0x3c, 0xb4, 0x4b]  # the border of the first box
    assert (picture[:, 120, 240:] == 255).all()  # the second is not sure enough
    inside = picture[:, 120, 80].float()
    torch.testing.assert_close(inside, torch.tensor([177., 225, 183]), atol=2, rtol=0)  # 40 % of the color
    draw_predictions(tmp_path / 'all.png', Oracle(dataset), dataset, torch.device('cpu'), count=4)
    with Image.open(tmp_path / 'all.png') as file:
        assert file.mode == 'RGB' and file.width > 3 * SIDE and 2 * SIDE < file.height < 2.1 * SIDE
