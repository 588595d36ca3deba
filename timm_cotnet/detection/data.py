"""Data sets in COCO's own layout, checked before anything is computed, and the order in which training sees them.

    DIR/annotations/instances_train2017.json   DIR/train2017/000000000009.jpg ...
    DIR/annotations/instances_val2017.json     DIR/val2017/000000000139.jpg ...

The format is described at https://cocodataset.org/#format-data (object detection).
"""
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask

from ..visualize import UNREADABLE

__all__ = ['AugmentedDataset', 'CocoDataset', 'DataError', 'TrainingSampler', 'find_split', 'training_transforms']

BORDER = 1.  # pixels by which a box may lie outside of its image, as rounded ones do; it is cut there
MIN_SIDE = 0.01  # pixels of the thinnest box that is trained on: thinner ones may be rounded to nothing when resized


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the entry."""


def find_split(folder: Path, split: str) -> Tuple[Path, Path]:
    """Annotations and images of a split.

    Args:
        folder: Data set in COCO's layout.
        split: Beginning of the split's name, 'train' or 'val'.

    Returns:
        The file `annotations/instances_<split>*.json` and the folder `<split>*`.

    Raises:
        DataError: If one is missing, or if there is more than one such file.
    """
    folder = Path(folder)
    found = sorted((folder / 'annotations').glob(f'instances_{split}*.json'))
    if len(found) != 1:
        names = ', '.join(path.name for path in found) or 'none'
        raise DataError(f'{folder}/annotations should hold one file instances_{split}*.json, but holds {names}')
    images = folder / found[0].stem[len('instances_'):]
    if not images.is_dir():
        raise DataError(f'{found[0]} belongs to images in {images}, which is no folder')
    return found[0], images


class CocoDataset(Dataset):
    """Images and targets as torchvision's detectors take them.

    An item is an image, uint8 (3, H, W), and a target: boxes (N, 4), float32, x1, y1, x2, y2 in pixels; labels (N,),
    int64; image_id; and with `masks` masks (N, H, W), uint8. Crowds and boxes thinner than 0.01 pixels inside of
    the image are left out of targets.

    Labels are the category ids where these are positive and at least half of the numbers up to the largest are taken,
    as in COCO (80 of 90) and in torchvision's models; else categories are numbered from 1 in the order of their ids.

    Args:
        annotations: File with COCO's annotations.
        images: Folder with its images.
        masks: Whether there are masks, so that every annotation needs a segmentation.
        only_annotated: Leave out images without a target, as training does.
        limit: Take the first images only, so many.

    Raises:
        DataError: If the files do not agree, or an entry is not what it should be.
    """

    def __init__(
            self,
            annotations: Path,
            images: Path,
            masks: bool = False,
            only_annotated: bool = False,
            limit: Optional[int] = None,
    ):
        self.path, self.folder, self.masks = Path(annotations), Path(images), masks
        content = self._read()
        self.categories = self._checked_categories(content['categories'])
        ids = sorted(self.categories)
        keeps_ids = ids[0] > 0 and ids[-1] <= 2 * len(ids)
        self.label_of = {i: i if keeps_ids else rank for rank, i in enumerate(ids, 1)}
        self.category_of = {label: i for i, label in self.label_of.items()}

        self.images = self._checked_images(content['images'])
        self.annotations: Dict[int, List[Dict[str, Any]]] = {i: [] for i in self.images}
        for index, annotation in enumerate(content['annotations']):
            self._check_annotation(annotation, f'annotations[{index}]')
            self.annotations[annotation['image_id']].append(annotation)
        self.ids = [i for i in self.images if self._targets(i) or not only_annotated][:limit]
        if not self.ids:
            raise DataError(f'{self.path} holds no image{" with a box" if only_annotated else ""}')
        for i in self.ids:
            self._check_file(i)

    @property
    def num_classes(self) -> int:
        """Number of labels with the background, label 0."""
        return max(self.category_of) + 1

    @property
    def names(self) -> Dict[int, str]:
        """Names of the labels."""
        return {label: self.categories[i] for label, i in sorted((label, i) for i, label in self.label_of.items())}

    def truth(self) -> Dict[str, Any]:
        """The annotations of these images in COCO's format, crowds among them, for evaluation."""
        found = [annotation for i in self.ids for annotation in self.annotations[i]]
        return dict(
            images=[self.images[i] for i in self.ids],
            # numbered from 1: an id of 0 means "not matched" in COCO's evaluation
            annotations=[{'iscrowd': 0, 'area': math.prod(annotation['bbox'][2:]), **annotation, 'id': number}
                         for number, annotation in enumerate(found, 1)],
            categories=[dict(id=i, name=name) for i, name in self.categories.items()],
        )

    def is_wide(self, index: int) -> bool:
        image = self.images[self.ids[index]]
        return image['width'] > image['height']

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Dict[str, Any]]:
        image_id = self.ids[index]
        entry, annotations = self.images[image_id], self._targets(image_id)
        path, size = self.folder / entry['file_name'], (entry['height'], entry['width'])
        try:
            with Image.open(path) as file:
                image = v2.functional.pil_to_tensor(file.convert('RGB'))
        except UNREADABLE as error:
            raise DataError(f'{path} cannot be read as an image: {error}') from error
        if tuple(image.shape[1:]) != size:
            raise DataError(f'{path} has {image.shape[2]} x {image.shape[1]} pixels, but {self.path} says '
                            f'{size[1]} x {size[0]} (image {image_id})')
        boxes = torch.tensor([a['bbox'] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes = v2.functional.convert_bounding_box_format(BoundingBoxes(boxes, format='XYWH', canvas_size=size),
                                                          new_format='XYXY')
        target = dict(
            boxes=v2.functional.clamp_bounding_boxes(boxes),
            labels=torch.tensor([self.label_of[a['category_id']] for a in annotations], dtype=torch.int64),
            image_id=image_id,
        )
        if self.masks:
            masks = [_decode(a['segmentation'], *size) for a in annotations]
            target['masks'] = Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        return image, target

    def _targets(self, image_id: int) -> List[Dict[str, Any]]:
        image = self.images[image_id]
        return [a for a in self.annotations[image_id] if not a.get('iscrowd') and _has_area(a['bbox'], image)]

    def _read(self) -> Dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f'{self.path} cannot be read as JSON: {error}') from error
        for name in ('images', 'annotations', 'categories'):
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise DataError(f'{self.path} has no list "{name}"; expected COCO\'s annotations of object detection')
        return content

    def _checked_categories(self, entries: List[Any]) -> Dict[int, str]:
        categories: Dict[int, str] = {}
        for index, entry in enumerate(entries):
            where = f'categories[{index}]'
            self._expect(isinstance(entry, dict) and _is_int(entry.get('id')), where, entry, 'with an integer id')
            self._expect(entry['id'] not in categories, where, entry, 'with an id of its own')
            categories[entry['id']] = str(entry.get('name', entry['id']))
        self._expect(bool(categories), 'categories', entries, 'with one category at least')
        return categories

    def _checked_images(self, entries: List[Any]) -> Dict[int, Dict[str, Any]]:
        images: Dict[int, Dict[str, Any]] = {}
        for index, entry in enumerate(entries):
            where = f'images[{index}]'
            self._expect(isinstance(entry, dict) and _is_int(entry.get('id')), where, entry, 'with an integer id')
            self._expect(entry['id'] not in images, where, entry, 'with an id of its own')
            self._expect(isinstance(entry.get('file_name'), str), where, entry, 'with a file_name')
            self._expect(all(_is_int(entry.get(name)) and entry[name] > 0 for name in ('width', 'height')),
                         where, entry, 'with a positive width and height')
            images[entry['id']] = entry
        return images

    def _check_annotation(self, entry: Any, where: str) -> None:
        self._expect(isinstance(entry, dict), where, entry, 'to be an object')
        image_id, category_id = entry.get('image_id'), entry.get('category_id')
        self._expect(_is_int(image_id) and image_id in self.images, where, entry,
                     'with the image_id of one of its images')
        image = self.images[image_id]
        self._expect(_is_int(category_id) and category_id in self.categories, where, entry,
                     'with the category_id of one of its categories')
        box = entry.get('bbox')
        self._expect(isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0,
                     where, entry, 'with a bbox of four numbers: x, y, width, height')
        x, y, width, height = box
        self._expect(
            min(x, y) >= -BORDER and x + width <= image['width'] + BORDER and y + height <= image['height'] + BORDER,
            where, entry, f'with a bbox inside its image of {image["width"]} x {image["height"]} pixels')
        is_crowd = entry.get('iscrowd', 0)
        self._expect(isinstance(is_crowd, int) and is_crowd in (0, 1), where, entry, 'with an iscrowd of 0 or 1')
        if self.masks:
            self._expect(_is_segmentation(entry.get('segmentation'), image), where, entry,
                         'with a segmentation: polygons, or a run-length code that fills its image')

    def _check_file(self, image_id: int) -> None:
        path = self.folder / self.images[image_id]['file_name']
        try:
            is_empty = path.stat().st_size == 0
        except OSError as error:
            raise DataError(f'{self.path} lists image {image_id}, but {path} cannot be read: {error}') from error
        if is_empty or path.is_dir():
            raise DataError(f'{self.path} lists image {image_id}, but {path} is {"empty" if is_empty else "a folder"}')

    def _expect(self, is_right: bool, where: str, entry: Any, wanted: str) -> None:
        if not is_right:
            text = json.dumps(entry)
            if len(text) > 200:
                name = f' (id {entry["id"]})' if isinstance(entry, dict) and 'id' in entry else ''
                text = f'{text[:200]}...{name}'
            raise DataError(f'{self.path}: {where} is {text}, expected {wanted}')


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _has_area(box: List[float], image: Dict[str, Any]) -> bool:
    """Whether something of a box, given as x, y, width and height, is left inside of its image."""
    x, y, width, height = box
    return (min(x + width, image['width']) - max(x, 0) >= MIN_SIDE
            and min(y + height, image['height']) - max(y, 0) >= MIN_SIDE)


def _is_segmentation(value: Any, image: Dict[str, Any]) -> bool:
    if isinstance(value, dict):
        size, counts = [image['height'], image['width']], value.get('counts')
        counts = _runs(counts) if isinstance(counts, str) else counts
        return value.get('size') == size and isinstance(counts, list) and all(
            _is_int(count) and count >= 0 for count in counts) and sum(counts) == math.prod(size)
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_finite, polygon))
        for polygon in value)


def _runs(text: str) -> List[int]:
    """The run lengths of COCO's compressed code; none where it is no such code.

    A character holds five bits, the lowest first, and whether more of the number follow; from the fourth number on,
    it is the difference to the last but one that is written.
    """
    runs: List[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else []


def _decode(segmentation: Any, height: int, width: int) -> torch.Tensor:
    """The mask (H, W), uint8, of polygons or of a run-length code."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict) and isinstance(segmentation['counts'], str):
        return torch.from_numpy(mask.decode(segmentation))
    codes = mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(mask.decode(mask.merge(codes) if isinstance(codes, list) else codes))


def training_transforms() -> v2.Transform:
    """What is done to images and targets in training: a flip from left to right, half of the times.

    Sizes are varied by the detectors themselves (`min_size`).
    """
    return v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


class AugmentedDataset(Dataset):
    """Items by index and seed: whoever loads an item, the same augmentation comes out.

    Args:
        dataset: Images and targets.
        transforms: What is done to them; draws from PyTorch's generator.
    """

    def __init__(self, dataset: CocoDataset, transforms: v2.Transform):
        self.dataset, self.transforms = dataset, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int]) -> Tuple[torch.Tensor, Dict[str, Any]]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transforms(*self.dataset[index])


class TrainingSampler(Sampler):
    """Batches for a number of iterations: a function of seed and iteration, so that a run can go on anywhere.

    Every epoch has a new order. Wide and tall images come in batches of their own, which need less padding.

    Args:
        dataset: Images to choose from.
        batch_size: Images of an iteration, over all processes.
        iterations: Number of iterations in all.
        start: First iteration.
        seed: Seed of the order and of the augmentation.
        rank: This process, which gets its share of each batch.
        world_size: Number of processes.
    """

    def __init__(
            self,
            dataset: CocoDataset,
            batch_size: int,
            iterations: int,
            start: int = 0,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.dataset, self.batch_size, self.iterations, self.start = dataset, batch_size, iterations, start
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        return self.iterations - self.start

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        batches = enumerate(itertools.islice(self._batches(), self.iterations))
        for iteration, batch in itertools.islice(batches, self.start, None):
            keys = [(index, seed_of(self.seed, iteration, place)) for place, index in enumerate(batch)]
            yield keys[self.rank::self.world_size]

    def _batches(self) -> Iterator[List[int]]:
        waiting: Tuple[List[int], List[int]] = ([], [])
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(seed_of(self.seed, 'epoch', epoch))
            for index in torch.randperm(len(self.dataset), generator=generator).tolist():
                group = waiting[self.dataset.is_wide(index)]
                group.append(index)
                if len(group) == self.batch_size:
                    yield group.copy()
                    group.clear()


def seed_of(*parts: Any) -> int:
    """A seed made of several values, the same on every machine."""
    return random.Random(' '.join(map(str, parts))).getrandbits(63)
