"""Pictures of a report: what is drawn, at which scale, and that a method looks alike everywhere."""

import hashlib
import itertools
import re

import matplotlib.pyplot
import numpy as np
import pytest
from report_rows import report_of, row, sweep_rows

from ttq_jax.quant.names import METHODS
from ttq_jax.sweeps import pictures
from ttq_jax.sweeps.looks import Drawing, finish, look
from ttq_jax.sweeps.tables import along, summaries


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is finished, in order."""
    found = []
    monkeypatch.setattr(
        pictures, "finish", lambda figure: found.append(figure) or Drawing(b"<svg >", b"")
    )
    yield found
    matplotlib.pyplot.close("all")


def test_who_does_not_read_an_axis_is_a_horizontal_line(tmp_path, figures):
    rows = [row({"corpus": "c4", "recipe": "none"}, 0)]
    rows.append(row({"corpus": "c4", "recipe": "ttq", "bits": 3}, 0.2))
    rows += [row({"corpus": "c4", "recipe": "awq", "bits": 3, "calibration": "c4",
                  "calibration_tokens": n}, 0.3) for n in (64, 128)]  # fmt: skip
    report_of(tmp_path / "s", rows)
    (axes,) = figures[0].axes
    gap = next(s for s in summaries(rows) if s.values["recipe"] == "ttq").gap
    (flat,) = [line for line in axes.lines if line.get_label() == "TTQ"]
    np.testing.assert_allclose(flat.get_ydata(), gap)


def drawn(figures, axis, rows):
    """The axes of a picture of `rows` along an axis."""
    pictures.draw_lines(axis, along(summaries(rows), axis), "", {})
    (axes,) = figures[-1].axes
    return axes


def test_a_gap_of_noise_does_not_stretch_the_picture(figures):
    rows = [row({"corpus": "c4", "recipe": "none"}, 0)]
    costs = {2: 3.0, 3: 0.3, 4: 0.001}
    rows += [row({"corpus": "c4", "recipe": "rtn", "bits": b}, c) for b, c in costs.items()]
    assert drawn(figures, "bits", rows[:3]).get_yscale() == "log"
    rows[3]["nll"] = rows[0]["nll"]
    axes = drawn(figures, "bits", rows)
    assert axes.get_yscale() == "symlog"
    assert -0.1 < axes.get_ylim()[0] < 0


@pytest.mark.parametrize(("values", "scale"), [((0.01, 0.1, 4.0), "log"), ((0.25, 1.0), "linear"),
                                               ((0.0, 4.0), "linear")])  # fmt: skip
def test_a_wide_axis_is_logarithmic(figures, values, scale):
    rows = [row({"corpus": "c4", "recipe": "ttq", "bits": 3, "lam": lam}, 0.2) for lam in values]
    assert drawn(figures, "lam", rows).get_xscale() == scale


def test_along_bits_a_point_stands_at_the_bits_it_stores(figures):
    axes = drawn(figures, "bits", sweep_rows())
    at = [line[0].get_xdata().tolist() for line in axes.containers]
    lines = along(summaries(sweep_rows()), "bits").values()
    assert at == [[bits + 1.0 for bits in line] for line in lines]
    assert "stored" in axes.get_xlabel()


def test_an_axis_says_what_is_averaged_over_what(figures):
    axes = drawn(figures, "bits", sweep_rows())
    said = axes.get_ylabel().replace("\n", " ")
    assert said == "perplexity increase over the unquantized model mean of 3 corpora"
    assert axes.yaxis.get_major_formatter()(0.25, 0) == "25 %"
    without = [r for r in sweep_rows() if r["cell"]["recipe"] != "none"]
    said = drawn(figures, "bits", without).get_ylabel().replace("\n", " ")
    assert said == "perplexity geometric mean of 3 corpora"


def test_a_method_looks_alike_in_every_picture(figures):
    seen = {}
    for kept in (("rtn", "ttq", "awq"), ("awq",), ("ttq", "awq")):
        axes = drawn(figures, "bits", [r for r in sweep_rows() if r["cell"]["recipe"] in kept])
        for line in axes.containers:
            name = re.split(r" calibrated|, ", line.get_label())[0]
            seen.setdefault(name, set()).add((line[0].get_color(), line[0].get_marker()))
    assert set(seen) == {"RTN", "TTQ", "AWQ"}
    assert all(len(looks) == 1 for looks in seen.values())
    looks = [look(name) for name in METHODS if name != "none"] + [look("mine.toml")]
    for key in ("color", "marker"):
        assert len({one[key] for one in looks}) == len(looks)
    again = {tuple(look("awq", n)[key] for key in ("linestyle", "fillstyle")) for n in range(4)}
    assert len(again) == 4, "lines of one method can be told apart"


def test_nothing_is_cut_off_or_lies_on_something_else(figures, tmp_path):
    """Every text is inside the figure, and no legend or label covers the axes."""
    report_of(tmp_path / "s", sweep_rows())
    assert len(figures) == 2
    for figure in figures:
        figure.canvas.draw()
        whole = figure.get_tightbbox()
        assert whole.width < 5.5, "a picture keeps the width for which its letters were chosen"
        for axes in figure.axes:
            ticks = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
            turned = any(t.get_rotation() for t in axes.get_xticklabels())
            ticks = sorted(ticks, key=lambda box: box.x0)
            assert turned or all(a.x1 <= b.x0 for a, b in itertools.pairwise(ticks))
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_same_rows_make_the_same_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report_of(tmp_path / name / "s", sweep_rows())
        made = sorted(path for path in (tmp_path / name).rglob("*.*") if path.suffix != ".jsonl")
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in made])
    assert len(digests[0]) == 4 + 2 * 2
    assert digests[0] == digests[1]


def test_a_picture_follows_a_dark_scheme_and_holds_no_date():
    axes = matplotlib.pyplot.figure().add_subplot()
    axes.plot([1, 2], **look("gptq"))
    drawing = finish(axes.figure)
    text = drawing.svg.decode()
    assert text.count("prefers-color-scheme: dark") == 1
    (sheet,) = re.findall("<style>(@media.*?)</style>", text)
    for light in re.findall(r'\*="(\w+: #\w+)"', sheet)[1:3]:
        assert text.count(light) > 1, "the style sheet names colours as they are written"
    assert not re.search(r"\d{4}-\d\d-\d\dT", text)
    assert b"CreationDate" not in drawing.pdf
