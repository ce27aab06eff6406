"""The layer's diagram says what the layer does, with the sizes it is given, and the matrices are drawn to scale."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Polygon, Rectangle
from matplotlib.transforms import Bbox

from lora_edu.lab import diagrams, plots


def texts(fig):
    """{text: where it stands}; the same words may stand at several places."""
    found = {}
    for text in fig.axes[0].texts:
        if text.get_text():
            found.setdefault(text.get_text(), []).append(text.get_position())
    return found


def sides(fig, color):
    """(left, right, height of the left side, height of the right side) of the one box with that colour."""
    (box,) = [patch for patch in fig.axes[0].patches if isinstance(patch, Polygon) and drawn_in(patch, color)]
    (left, low), (_, high), (right, top), (_, bottom) = box.get_xy()[:4]
    return left, right, high - low, top - bottom


def drawn_in(patch, color):
    return plt.matplotlib.colors.same_color(patch.get_facecolor(), color)


def test_the_layer_carries_the_sizes_it_is_given():
    said = texts(diagrams.lora_layer(64, 128, 4, scaling=2))
    assert {"x", "h", "W₀", "A", "B", "+", "× 2", "(…, 64)", "(…, 4)"} <= said.keys()
    assert {"frozen, 128 × 64", "trained, 4 × 64", "trained, 128 × 4"} <= said.keys()
    assert len(said["(…, 128)"]) == 3  # behind W₀, behind B, and at the sum


def test_a_narrows_b_widens_and_the_order_is_x_a_b_scale_sum():
    fig = diagrams.lora_layer()
    a, b, w = (sides(fig, color) for color in (diagrams.A_COLOR, diagrams.B_COLOR, diagrams.FROZEN))
    assert a[2] > a[3] == b[2] < b[3]
    assert w[2] == w[3]
    said = texts(fig)
    assert said["x"][0][0] < a[0] < a[1] < b[0] < b[1] < said["× s"][0][0] < said["+"][0][0] < said["h"][0][0]


def test_dropout_stands_before_a_on_the_lower_path_alone():
    without, fig = diagrams.lora_layer(), diagrams.lora_layer(dropout=True)
    assert "drop" not in texts(without)
    ((place, height),) = texts(fig)["drop"]
    assert place < sides(fig, diagrams.A_COLOR)[0]
    assert height == diagrams.LOW


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sizes", [("in", "out", "r"), (4096, 11008, 128)])
def test_no_two_texts_overlap_and_all_can_be_read(sizes, dropout):
    fig = diagrams.lora_layer(*sizes, dropout=dropout)
    fig.canvas.draw()
    written = [text for text in fig.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in written]
    for i, box in enumerate(boxes):
        assert not [other for other in boxes[:i] if Bbox.intersection(box, other)], written[i].get_text()
        assert fig.bbox.contains(box.x0, box.y0)
        assert fig.bbox.contains(box.x1, box.y1)
    assert min(text.get_fontsize() for text in written) >= 12


def test_to_scale():
    fig = diagrams.to_scale(64, 128, 4)
    found = {
        color: next(p for p in fig.axes[0].patches if isinstance(p, Rectangle) and drawn_in(p, color))
        for color in (diagrams.FROZEN, diagrams.A_COLOR, diagrams.B_COLOR)
    }
    assert [(p.get_width(), p.get_height()) for p in found.values()] == [(64, 128), (64, 4), (4, 128)]
    assert fig.axes[0].get_aspect() == 1
    assert {"W₀\n128 × 64", "A: 4 × 64", "B: 128 × 4"} <= texts(fig).keys()


def test_drawing_into_given_axes():
    fig, axes = plots.figure(1, 2)
    assert diagrams.lora_layer(axes=axes[0]) is fig
    assert diagrams.to_scale(4, 4, 1, axes=axes[1]) is fig


@pytest.fixture(autouse=True)
def close_all():
    yield
    plt.close("all")
