"""scikit-learn's handwritten digits (1797 real images of 8x8 pixels) as an image folder for timm's loaders."""
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image

SIZE = 32  # the images are enlarged so that random crops are finer than a pixel of theirs
HELD_OUT = 5  # every fifth image of each digit is for validation


def write_digits(folder: Union[str, Path]) -> Path:
    """Writes the digits as RGB PNG files `<split>/<digit>/<index>.png` and returns the folder.

    The split is fixed: the 1st, 6th, 11th, ... image of each digit goes to `val` (364 images), the rest to `train`
    (1433 images).

    Args:
        folder: Where to write; made if it does not exist. Files of an earlier run are written again.
    """
    from sklearn.datasets import load_digits

    folder = Path(folder)
    digits = load_digits()
    for digit in range(10):
        for rank, index in enumerate(np.flatnonzero(digits.target == digit)):
            path = folder / ('train' if rank % HELD_OUT else 'val') / str(digit) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            ink = Image.fromarray((digits.images[index] * (255 / 16)).round().astype(np.uint8))  # 0 (paper) ... 16
            ink.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert('RGB').save(path)
    return folder
