"""The figures of the README: they show what is published and measured now, and can be read on any page."""
import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from timm_cotnet.published import PUBLISHED

pytest.importorskip('matplotlib', reason='figures are drawn with matplotlib, of the extra "demo"')
sys.path.insert(0, str(ROOT / 'tests' / 'benchmarks'))

import figures  # noqa: E402

SVG = '{http://www.w3.org/2000/svg}'
TEXT = (ROOT / 'README.md').read_text()


def texts(path):
    return sorted(''.join(text.itertext()) for text in ElementTree.parse(path).iter(f'{SVG}text'))


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plots')
    figures.draw(folder)
    return folder


@pytest.mark.parametrize('name', figures.FIGURES)
def test_figures_are_up_to_date(name, drawn):
    """If not: python tests/benchmarks/figures.py"""
    path = figures.PLOTS / f'{name}.svg'
    assert texts(path) == texts(drawn / path.name)
    assert path.stat().st_size < 50_000
    root = ElementTree.parse(path).getroot()
    background = next(root.iter(f'{SVG}path'))
    assert 'fill: #ffffff' in background.get('style')  # dark pages are no ground for dark lines
    assert f'({path.relative_to(ROOT)})' in TEXT


def test_accuracy_has_all_published_points():
    axes, = figures.draw_accuracy().axes
    points = {tuple(point) for line in axes.lines for point in line.get_xydata()}
    assert points >= {(facts.gmacs, facts.top1) for facts in PUBLISHED.values()}
    assert len(points) == len(PUBLISHED) + sum(map(len, figures.OTHERS.values()))
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    assert all(left < x < right and low < y < high for x, y in points)


def test_speed_has_the_times_of_the_readme():
    tables = figures.speed_tables()
    assert set(tables) == {'CPU', 'GPU'}
    for row in (row for rows in tables.values() for row in rows):
        assert f'| {row.ours} | {row.other} | ' in TEXT
        ours, other = (float(re.match('[0-9.]+', time)[0]) for time in (row.ours, row.other))
        assert row.ratio == pytest.approx(ours / other, rel=0.02)  # the ratio is that of times before they were rounded
    assert len(tables['CPU']) > 10 and len(tables['GPU']) > 3
