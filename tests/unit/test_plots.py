"""Figures: one style, an alternative text for each, and nothing left open."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lora_edu.lab import plots


@pytest.fixture
def shown(monkeypatch):
    published = []
    monkeypatch.setattr(plots, "publish_display_data", lambda data, metadata: published.append((data, metadata)))
    return published


def test_show_publishes_prints_and_closes(shown, capsys):
    fig = plots.losses({"LoRA": ([1, 2, 3], [3.0, 2.0, 1.0])})
    plots.show(fig, alt="The loss falls\n  from 3.00 to 1.00.")
    data, metadata = shown[0]
    assert metadata == {"image/png": {"alt": "The loss falls from 3.00 to 1.00."}}
    assert capsys.readouterr().out == "The loss falls from 3.00 to 1.00.\n"
    assert not plt.fignum_exists(fig.number)
    raw = data["image/png"]
    picture = Image.open(io.BytesIO(raw if isinstance(raw, bytes) else base64.b64decode(raw)))
    assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    assert picture.width >= 600


def test_the_picture_depends_on_the_data_alone(shown, capsys):
    for _ in range(2):
        plots.show(plots.losses({"a": [3, 2, 1]}), alt="It falls.")
    assert shown[0][0] == shown[1][0]


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_empty_alternative_text(alt):
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show(plots.losses({"a": [1, 2]}), alt=alt)


def test_curves_differ_in_colour_marker_and_dash():
    lines = plots.losses({str(i): [i, i + 1] for i in range(8)}).axes[0].lines
    for look in ("get_color", "get_marker"):
        assert len({getattr(line, look)() for line in lines}) == 8
    assert len({repr(line._dash_pattern) for line in lines}) == 8
    assert {line.get_linewidth() for line in lines} == {2}


def test_letters_are_large_enough_for_a_projector():
    for fig in (
        plots.losses({"a": [1, 2]}, title="t"),
        plots.bars({"q": {"x": 1.0, "y": 2.0}}, title="t", ylabel="n"),
        plots.heatmap(np.eye(3), title="t", xlabel="i", ylabel="j"),
    ):
        fig.canvas.draw()
        texts = [text for text in fig.findobj(plt.Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in texts) >= 12


def test_bars_carry_their_values_and_leave_out_what_is_missing():
    axes = plots.bars({"q": {"LoRA": 1.5, "full": 2.0}, "v": {"full": 3.0}}).axes[0]
    assert [patch.get_height() for patch in axes.patches] == [1.5, 2.0, 3.0]
    assert {"1.50", "2.00", "3.00"} <= {text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "v"]


def test_spectrum_is_logarithmic_and_takes_arrays():
    axes = plots.spectrum({"W": np.array([10.0, 1.0, 0.1])}).axes[0]
    assert axes.get_yscale() == "log"
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]


def test_drawing_into_given_axes():
    fig, axes = plots.figure(1, 2)
    assert plots.losses({"a": [1, 2]}, axes=axes[0]) is fig
    assert plots.heatmap(np.eye(2), axes=axes[1], limits=(0, 1)) is fig
    assert axes[1].images[0].get_clim() == (0, 1)


def test_bad_curves():
    with pytest.raises(ValueError, match="'a' has 3 steps and 2 values"):
        plots.losses({"a": ([1, 2, 3], [1, 2])})
    with pytest.raises(ValueError, match="no curve"):
        plots.losses({})
    with pytest.raises(ValueError, match="no bar"):
        plots.bars({})


@pytest.fixture(autouse=True)
def close_all():
    yield
    plt.close("all")
