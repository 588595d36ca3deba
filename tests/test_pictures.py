"""Pictures at the ends of their ranges; those of images are looked at in test_visualize.py."""
import pytest
import torch

pytest.importorskip('matplotlib', reason='pictures are drawn with matplotlib, of the extra "demo"')

from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from timm_cotnet.pictures import draw_grad_cam, draw_training, overlay, plain, shorten  # noqa: E402


@pytest.mark.parametrize('steps, epochs', [(1, 0), (60, 3)])
def test_training_curve(steps, epochs, tmp_path):
    path = draw_training(tmp_path / 'curve.png', 'model', [2.] * steps, 0.5, [90.] * epochs)
    with Image.open(path) as picture:
        assert picture.width > 800 and picture.height > 300
        for box in ((0, 0, picture.width, 2), (0, picture.height - 2, picture.width, picture.height)):
            assert picture.convert('L').crop(box).getextrema() == (255, 255)


def test_dollars_are_no_formulas(tmp_path):
    """As in names of files and classes: neither refused nor drawn as one."""
    names = ['a$_x$b$^$', 'costs $5 and $6']
    assert draw_training(tmp_path / 'curve.png', names[0], [2., 1.], 0.5, [90.]).exists()
    assert draw_grad_cam(
        tmp_path / 'cam.png', names[0], torch.rand(32, 32, 3), torch.rand(2, 4, 4), names).exists()
    text = Figure().text(0, 0, plain(names[1]))
    assert text._preprocess_math(text.get_text()) == (names[1], False)


def test_many_classes_take_several_rows(tmp_path):
    path = draw_grad_cam(
        tmp_path / 'cam.png', 'model', torch.rand(32, 32, 3), torch.rand(10, 4, 4), [f'class {i}' for i in range(10)])
    with Image.open(path) as picture:
        assert picture.width < 1500 and picture.height > 900


def test_map_lies_over_the_whole_image_and_its_bar_says_what_lies_outside():
    figure = Figure()
    ax = figure.subplots()
    overlay(ax, torch.rand(30, 40, 3), torch.tensor([[0., 1.], [2., 9.]]), 'viridis', 0.5, 3, 'length')
    background, values = ax.get_images()
    assert background.get_extent() == values.get_extent()
    assert background.get_array().min() > 0.3  # light enough for the colours of the map
    bar = figure.axes[1]
    assert bar.get_ylabel() == 'length' and values.colorbar.extend == 'both'


def test_long_names_are_cut():
    assert shorten('cat', 5) == 'cat' and shorten('caterpillar', 8) == 'cater...'
