"""Data in COCO's layout: what comes out of it, what is refused and how, and the order of training."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from timm_cotnet.detection.data import (
    AugmentedDataset, CocoDataset, DataError, TrainingSampler, find_split, training_transforms)
from timm_cotnet.detection.shapes import main, write_shapes
from timm_cotnet.visualize import UNREADABLE

pytest.importorskip('faster_coco_eval', reason='masks are decoded by faster-coco-eval, of the extra "detection"')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'), train=12, val=6)


def write(folder, content, sizes=((40, 30),)):
    """A split `val` with this content, or text, and images of these widths and heights."""
    (folder / 'annotations').mkdir()
    (folder / 'val').mkdir()
    for index, size in enumerate(sizes, 1):
        Image.new('RGB', size).save(folder / 'val' / f'{index}.png')
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / 'annotations' / 'instances_val.json').write_text(text)
    return find_split(folder, 'val')


def content(**changes):
    """One image with one square."""
    annotation = dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 10, 8], segmentation=[[5, 6, 15, 6, 15, 14, 5, 14]])
    return dict(
        images=[dict(id=1, file_name='1.png', width=40, height=30)],
        annotations=[{**annotation, **changes}],
        categories=[dict(id=1, name='square')],
    )


NOTHING_LEFT = [  # of these boxes once they are cut at the border, or rounded to single precision
    [40.2, 5, 0.5, 8], [-0.9, 5, 0.5, 8], [5, 30.2, 8, 0.5], [5, -0.9, 8, 0.5], [30, 5, 1e-7, 8], [5, 6, 8, 1e-7]]


def test_shapes_are_the_same_each_time_and_their_boxes_are_those_of_their_masks(shapes, tmp_path, capsys):
    main([str(tmp_path), '--train', '12', '--val', '6'])
    assert str(tmp_path) in capsys.readouterr().out
    names = sorted(path.relative_to(shapes) for path in shapes.rglob('*.*'))
    assert len(names) == 20
    for name in names:
        assert (shapes / name).read_bytes() == (tmp_path / name).read_bytes()
    dataset = CocoDataset(*find_split(shapes, 'train'), masks=True)
    assert len(dataset) == 12 and dataset.num_classes == 4
    assert dataset.names == {1: 'circle', 2: 'square', 3: 'triangle'}
    overlaps = 0
    for index, (image, target) in enumerate(dataset):
        entry = dataset.images[target['image_id']]
        assert image.dtype == torch.uint8 and image.shape == (3, entry['height'], entry['width'])
        assert dataset.is_wide(index) == (image.shape[2] > image.shape[1])
        masks = target['masks']
        assert masks.shape == (len(target['labels']), *image.shape[1:]) and masks.sum(0).max() == 1
        torch.testing.assert_close(
            torch.as_tensor(target['boxes']), masks_to_boxes(masks) + torch.tensor([0., 0., 1., 1.]))
        areas = [annotation['area'] for annotation in dataset.annotations[target['image_id']]]
        assert masks.sum((1, 2)).tolist() == areas
        overlaps += (target['boxes'][:, 2:] - target['boxes'][:, :2]).prod(1).sum() > masks.sum()
    assert overlaps > 0


def test_polygons_run_lengths_crowds_and_boxes_without_area(tmp_path):
    first = content()['annotations'][0]
    counts = [5 * 30 + 6] + [8, 22] * 9 + [8]  # down the columns: the same square
    counts.append(40 * 30 - sum(counts))
    found = content()
    found['annotations'] = [
        first,
        dict(first, id=2, bbox=[5, 6, 10, 8], segmentation=dict(size=[30, 40], counts=counts)),
        dict(first, id=3, iscrowd=1, segmentation=dict(size=[30, 40], counts=counts)),
        dict(first, id=4, bbox=[5, 6, 0, 8]),
        dict(first, id=5, bbox=[39, 29, 1.5, 1.5]),  # cut at the border
        *(dict(first, id=6 + i, bbox=bbox) for i, bbox in enumerate(NOTHING_LEFT)),
    ]
    dataset = CocoDataset(*write(tmp_path, found), masks=True)
    _, target = dataset[0]
    assert target['boxes'].tolist() == [[5, 6, 15, 14], [5, 6, 15, 14], [39, 29, 40, 30]]
    assert target['masks'].dtype == torch.uint8
    square = torch.zeros(30, 40, dtype=torch.uint8)
    square[6:14, 5:15] = 1
    assert torch.equal(torch.as_tensor(target['masks'][0]), square) and torch.equal(*target['masks'][:2])
    truth = dataset.truth()['annotations']
    assert [a['id'] for a in truth] == list(range(1, 6 + len(NOTHING_LEFT)))
    assert [a['iscrowd'] for a in truth] == [0, 0, 1, *[0] * (2 + len(NOTHING_LEFT))]


def test_compressed_run_lengths(tmp_path):
    from faster_coco_eval.core import mask

    generator = np.random.default_rng(0)
    for index, share in enumerate((0.01, 0.5, 0.99, 0, 1)):
        expected = (generator.random((30, 40)) < share).astype(np.uint8)
        code = mask.encode(np.asfortranarray(expected))
        (tmp_path / str(index)).mkdir()
        found = content(segmentation=dict(size=[30, 40], counts=code['counts'].decode()))
        _, target = CocoDataset(*write(tmp_path / str(index), found), masks=True)[0]
        assert np.array_equal(target['masks'][0], expected)


def test_images_without_targets_are_evaluated_but_not_trained_on(tmp_path):
    found = content()
    found['images'] = [dict(id=i, file_name=f'{i}.png', width=40, height=30) for i in (1, 2)]
    files = write(tmp_path, found, sizes=[(40, 30)] * 2)
    assert len(CocoDataset(*files, only_annotated=True)) == 1
    dataset = CocoDataset(*files, masks=True)
    _, target = dataset[1]
    assert target['boxes'].shape == (0, 4) and target['labels'].shape == (0,) and target['masks'].shape == (0, 30, 40)
    assert len(CocoDataset(*files, limit=1)) == 1


@pytest.mark.parametrize('ids, labels', [
    ([1, 2, 3], [1, 2, 3]),
    ([1, 3, 4], [1, 3, 4]),  # most are taken, as in COCO
    ([0, 1, 2], [1, 2, 3]),  # 0 is the background
    ([100, 7], [2, 1]),
])
def test_labels_of_categories(tmp_path, ids, labels):
    found = content(category_id=ids[0])
    found['categories'] = [dict(id=i, name=f'name {i}') for i in ids]
    dataset = CocoDataset(*write(tmp_path, found))
    assert [dataset.label_of[i] for i in ids] == labels
    assert dataset[0][1]['labels'].tolist() == labels[:1]
    assert dataset.names[labels[0]] == f'name {ids[0]}' and dataset.num_classes == max(labels) + 1


@pytest.mark.parametrize('broken, message', [
    ('', 'cannot be read as JSON'),
    ('{"images": []', 'cannot be read as JSON'),
    ('[]', 'has no list "images"'),
    (dict(images=[], annotations=[], categories=[]), 'categories is .*, expected with one category'),
    (dict(images=[], annotations=[], categories=[dict(id=1)]), 'holds no image'),
    (dict(content(), categories=[dict(id='1')]), r'categories\[0\] is .*, expected with an integer id'),
    (dict(content(), categories=[dict(id=1), dict(id=1)]), r'categories\[1\] is .*an id of its own'),
    (dict(content(), images=[dict(id=1, file_name='1.png', width=40)]), r'images\[0\] is .*positive width and height'),
    (dict(content(), images=[dict(id=1, width=40, height=30)]), r'images\[0\] is .*with a file_name'),
    (content(image_id=9), r'annotations\[0\] is .*"image_id": 9.*, expected with the image_id of one of its images'),
    (content(category_id=9), r'annotations\[0\] is .*, expected with the category_id of one of its categories'),
    (content(image_id=[1]), r'annotations\[0\] is .*, expected with the image_id of one of its images'),
    (content(category_id=[1]), r'annotations\[0\] is .*, expected with the category_id of one of its categories'),
    (content(bbox=[5, 6, 10]), r'annotations\[0\] is .*four numbers'),
    (content(bbox=[5, 6, -1, 8]), r'annotations\[0\] is .*four numbers'),
    (content(bbox=[5, 6, float('nan'), 8]), r'annotations\[0\] is .*four numbers'),
    (content(bbox=[35, 6, 10, 8]), r'annotations\[0\] is .*inside its image of 40 x 30 pixels'),
    (content(bbox=[-3, 6, 10, 8]), r'annotations\[0\] is .*inside its image of 40 x 30 pixels'),
    (content(segmentation=[]), r'annotations\[0\] is .*expected with a segmentation'),
    (content(segmentation=[[1, 2, 3, 4]]), r'annotations\[0\] is .*expected with a segmentation'),
    (content(segmentation=dict(size=[30, 40], counts=[81])), r'annotations\[0\] is .*run-length code that fills its'),
    (content(segmentation=dict(size=[30, 40], counts=[-1, 1201])), r'annotations\[0\] is .*that fills its image'),
    (content(segmentation=dict(size=[30, 40], counts='0120')), r'annotations\[0\] is .*that fills its image'),
    (content(segmentation=dict(size=[30, 40], counts='~')), r'annotations\[0\] is .*that fills its image'),
    (content(iscrowd=1, segmentation=None), r'annotations\[0\] is .*expected with a segmentation'),
    (content(iscrowd=None), r'annotations\[0\] is .*with an iscrowd of 0 or 1'),
    (content(id=77, segmentation=[[1.5] * 99]), r'annotations\[0\] is .*\.\.\. \(id 77\), expected with a segm'),
    (content(segmentation=dict(size=[9, 9], counts=[81])), r'annotations\[0\] is .*expected with a segmentation'),
    (dict(content(), images=[dict(id=1, file_name='2.png', width=40, height=30)]), 'lists image 1, but .*2.png cannot'),
])
def test_bad_annotations_are_named(tmp_path, broken, message):
    files = write(tmp_path, broken)
    with pytest.raises(DataError, match=message) as error:
        CocoDataset(*files, masks=True)
    assert str(files[0]) in str(error.value)


def test_bad_images_are_named(tmp_path):
    files = write(tmp_path, content(), sizes=[(30, 40)])
    with pytest.raises(DataError, match=r'1\.png has 30 x 40 pixels, but .*instances_val\.json says 40 x 30'):
        CocoDataset(*files)[0]
    path = tmp_path / 'val' / '1.png'
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r'1\.png cannot be read as an image'):
        CocoDataset(*files)[0]
    path.write_bytes(b'')
    with pytest.raises(DataError, match=r'lists image 1, but .*1\.png is empty'):
        CocoDataset(*files)


@pytest.mark.parametrize('error', UNREADABLE)
def test_whatever_pillow_raises_is_named(error, tmp_path, monkeypatch):
    dataset = CocoDataset(*write(tmp_path, content(), sizes=[(40, 30)]))

    def fail(path):
        raise error('broken')

    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(DataError, match=r'1\.png cannot be read as an image: broken'):
        dataset[0]


def test_layout_is_looked_for(tmp_path):
    with pytest.raises(DataError, match=r'should hold one file instances_val\*\.json, but holds none'):
        find_split(tmp_path, 'val')
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_val2017.json').write_text('{}')
    with pytest.raises(DataError, match='val2017, which is no folder'):
        find_split(tmp_path, 'val')
    (tmp_path / 'val2017').mkdir()
    assert [path.name for path in find_split(tmp_path, 'val')] == ['instances_val2017.json', 'val2017']
    (tmp_path / 'annotations' / 'instances_val2014.json').write_text('{}')
    with pytest.raises(DataError, match='holds instances_val2014.json, instances_val2017.json'):
        find_split(tmp_path, 'val')


def test_augmentation_follows_from_the_seed(shapes):
    dataset = CocoDataset(*find_split(shapes, 'train'), masks=True)
    augmented = AugmentedDataset(dataset, training_transforms())
    image, target = dataset[0]
    flipped = []
    state = torch.get_rng_state()
    for seed in range(8):
        torch.manual_seed(random.randrange(1000))
        (first, first_target), (again, again_target) = augmented[0, seed], augmented[0, seed]
        assert torch.equal(first, again) and torch.equal(first_target['boxes'], again_target['boxes'])
        is_same = torch.allclose(first, image / 255)
        flipped.append(not is_same)
        if not is_same:
            torch.testing.assert_close(first, image.flip(2) / 255)
            assert torch.equal(first_target['masks'], torch.as_tensor(target['masks']).flip(2))
            boxes = target['boxes'].as_subclass(torch.Tensor).clone()
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            torch.testing.assert_close(first_target['boxes'], boxes)
    torch.set_rng_state(state)
    augmented[0, 0]
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 < np.mean(flipped) < 1


def test_order_of_training(shapes):
    dataset = CocoDataset(*find_split(shapes, 'train'))
    whole = list(TrainingSampler(dataset, 4, iterations=9, seed=3))
    assert len(whole) == 9 == len(TrainingSampler(dataset, 4, iterations=9))
    assert list(TrainingSampler(dataset, 4, iterations=9, start=5, seed=3)) == whole[5:]
    assert list(TrainingSampler(dataset, 4, iterations=9, seed=4)) != whole
    shares = [list(TrainingSampler(dataset, 4, iterations=9, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    for batch, first, second in zip(whole, *shares):
        assert [key for pair in zip(first, second) for key in pair] == batch
        assert len({dataset.is_wide(index) for index, _ in batch}) == 1
    counts = np.bincount([index for batch in whole for index, _ in batch], minlength=12)
    assert counts.sum() == 36 and counts.max() <= 4  # three passes; at most two groups wait
    assert len({seed for batch in whole for _, seed in batch}) == 36
