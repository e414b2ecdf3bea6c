"""Reports: their numbers are those of the rows, and both files can be opened anywhere."""

import base64
import html.parser
import io
import json
import re
import sys

import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pytest
from report_tables import table_under

from ttq_jax.commands.main import main
from ttq_jax.sweeps import pictures
from ttq_jax.sweeps.axes import make_cell
from ttq_jax.sweeps.published import PUBLISHED
from ttq_jax.sweeps.tables import along, gap_draws, summaries

CORPORA = ("wikitext2", "ptb", "c4")
SCORED, WINDOWS = 10, 6


def row(point, extra, *, model="m", error=None):
    """A row of `point` that costs `extra` nats per token more than the unquantized model."""
    cell = make_cell({"model": model, "protocol": "window", "window": 16} | point)
    rng = np.random.default_rng([CORPORA.index(point["corpus"]), len(model)])
    plain = rng.normal(30, 3, WINDOWS)
    noise = 0 if point["recipe"] == "none" else rng.normal(0, 0.3, WINDOWS)
    nll = plain + SCORED * extra + noise
    made = {
        "key": cell.key, "cell": cell.values, "device": "abacus", "versions": {"jax": "0"},
        "recipe": None if cell.recipe is None else cell.recipe.describe(),
        "git_commit": None, "finished": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    if error:
        return made | {"error": error}
    return made | {
        "nll": list(nll), "scored": SCORED, "windows": WINDOWS,
        "perplexity": float(np.exp(nll.sum() / SCORED / WINDOWS)),
        "effective_bits": 32.0 if cell.recipe is None else cell.recipe.grid.bits + 1.0,
        "seconds": {"prepare": 1.0, "score": 59.0}, "peak_memory_bytes": 2e9,
        "corpus_sha256": "ab" * 32,
        "calibration_sha256": "cd" * 32 if "calibration" in cell.values else None,
    }  # fmt: skip


def sweep_rows():
    rows = []
    for corpus in CORPORA:
        rows.append(row({"corpus": corpus, "recipe": "none"}, 0))
        for bits in (2, 3, 4):
            base = 2.0**-bits
            rows.append(row({"corpus": corpus, "recipe": "rtn", "bits": bits}, 4 * base))
            rows.append(row({"corpus": corpus, "recipe": "ttq", "bits": bits}, 2 * base))
            for calibration in CORPORA:
                cost = 1.5 * base if calibration == corpus else 3 * base
                rows.append(row(
                    {"corpus": corpus, "recipe": "awq", "bits": bits, "calibration": calibration},
                    cost,
                ))  # fmt: skip
    rows.append(row({"corpus": "c4", "recipe": "hqq", "bits": 2}, 0, error="Oops: a\n b | c"))
    return rows


def write_rows(directory, rows):
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    write_rows(directory, sweep_rows())
    assert main(["report", str(directory), "--no-compilation-cache", "--quiet"]) == 0
    return directory


def test_the_results_are_those_of_the_rows(made):
    header, *body = table_under((made / "report.md").read_text(), "Results: m, window")
    assert header == ["recipe", "bits", *CORPORA, "mean", "gap"]
    rows = {(r["cell"]["recipe"], r["cell"].get("bits"), r["cell"].get("calibration"),
             r["cell"]["corpus"]): r for r in sweep_rows() if "error" not in r}  # fmt: skip
    assert len(body) == 1 + 3 * 5
    best = {}
    for cells in body:
        name, bits, *numbers = cells
        recipe = name.split(",")[0]
        width = re.search(r"bits (\d)", name)
        calibration = re.search(r"calibration (\w+)", name)
        key = (recipe, width and int(width[1]), calibration and calibration[1])
        ours = [rows[*key, c] for c in CORPORA]
        want = [r["perplexity"] for r in ours]
        shown = [float(n.strip("*").split()[0]) for n in numbers if n]
        np.testing.assert_allclose(shown[:4], [*want, np.mean(want)], atol=0.006)
        for j, (number, value) in enumerate(zip(numbers, [*want, np.mean(want)], strict=False)):
            if recipe != "none":
                best.setdefault(j, []).append((value, number.startswith("**")))
        if recipe == "none":
            assert numbers[-1] == ""
            assert float(bits) == 32
            continue
        plain = [rows["none", None, None, c]["perplexity"] for c in CORPORA]
        gap = np.mean([p / q - 1 for p, q in zip(want, plain, strict=True)])
        low, high = map(float, re.findall(r"[\d.]+", numbers[-1].split("[")[1]))
        assert shown[4] == pytest.approx(gap, abs=6e-4)
        assert low <= shown[4] <= high
    for column in best.values():
        assert [marked for _, marked in sorted(column)].count(True) == 1
        assert min(column)[1], "the best is marked"


def test_the_interval_is_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = [rng.normal(30, 5, 12), rng.normal(30, 5, 30)]
    draws = gap_draws([b + 3 for b in base], base, 10)
    np.testing.assert_allclose(draws, np.exp(0.3) - 1, rtol=1e-9)
    noisy = gap_draws([b + 3 + rng.normal(0, 1, len(b)) for b in base], base, 10)
    assert 0.005 < np.std(noisy[1:]) < 0.1
    assert noisy[0] == pytest.approx(np.mean(noisy[1:]), abs=3 * np.std(noisy))


def test_a_gap_needs_the_same_windows():
    rows = sweep_rows()
    assert all(s.gap for s in summaries(rows) if not s.is_plain)
    fewer = [r | {"nll": r["nll"][:3]} if r["cell"]["recipe"] == "none" else r for r in rows]
    assert not any(s.gap for s in summaries(fewer))
    without = [r for r in rows if r["cell"]["recipe"] != "none"]
    assert not any(s.gap for s in summaries(without))


def test_along_an_axis(made):
    text = (made / "report.md").read_text()
    header, *body = table_under(text, "Mean gap by bits: m")
    assert header == ["bits", "2", "3", "4"]
    shown = {cells[0]: [float(c.strip("*")) for c in cells[1:]] for cells in body}
    assert len(shown) == 5
    for values in shown.values():
        assert values == sorted(values, reverse=True)
    marked = [cells[0] for cells in body if cells[1].startswith("**")]
    assert marked == [min(shown, key=lambda name: shown[name][0])]


def test_domain_shift_is_the_first_picture_and_its_contest_is_counted(made):
    text = (made / "report.md").read_text()
    assert re.search(r"!\[.*?\]\((.*?)\)", text)[1] == "report/domains_0.png"
    header, *body = table_under(text, "Domain shift")
    assert len(body) == 3 * 2
    for cells in body:
        contest = dict(zip(header, cells, strict=True))
        assert contest["of pairs"] == "6"
        # Calibrated elsewhere AWQ costs 3, the prompt 2, RTN 4, with noise far below that.
        assert contest["better in"] == ("0" if contest["against"] == "ttq" else "6")


def test_every_published_cell_stands_beside_ours(made):
    header, *body = table_under((made / "report.md").read_text(), "Beside the paper")
    assert len(PUBLISHED) == 50
    published = [cells[0] for cells in body]
    for cell in PUBLISHED:
        assert f"{cell.table}: {cell.model}" in published
    ours = [dict(zip(header, cells, strict=True)) for cells in body if cells[5] != "not run"]
    assert {(one["method"], one["bits"]) for one in ours} == {
        (m, b) for m in ("RTN", "AWQ") for b in "234"
    }
    assert all("model m" in one["ours differs in"] for one in ours)


def test_a_model_of_the_paper_is_recognised(tmp_path):
    rows = []
    for corpus in CORPORA:
        for recipe, extra in (("none", 0), ("rtn", 0.3), ("paper", 0.2)):
            point = {"corpus": corpus, "recipe": recipe}
            if recipe != "none":
                point |= {"bits": 3, "rank": 16 if recipe == "paper" else 0}
            rows.append(row(point, extra, model="facebook/opt-125m"))
    write_rows(tmp_path / "s", rows)
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    header, *body = table_under((tmp_path / "s" / "report.md").read_text(), "Beside the paper")
    ours = [dict(zip(header, cells, strict=True)) for cells in body if cells[5] != "not run"]
    exact = [one for one in ours if one["published"] == "Table 3: OPT-125M"]
    assert [(one["method"], one["bits"], one["paper"]) for one in exact] == [
        ("RTN", "3", "56.30"), ("TTQ r=16", "3", "35.80"),
    ]  # fmt: skip
    for one in exact:
        assert "model" not in one["ours differs in"].replace("model name", "")
        assert "protocol" not in one["ours differs in"]
    assert all("model facebook/opt-125m" in o["ours differs in"] for o in ours if o not in exact)


def test_another_scale_than_the_paper_s_is_said(tmp_path):
    rows = []
    for corpus in CORPORA:
        for alpha in (0.5, 0.75):
            point = {"corpus": corpus, "recipe": "paper", "bits": 3, "rank": 16, "alpha": alpha}
            rows.append(row(point, 0.2, model="facebook/opt-125m"))
    write_rows(tmp_path / "s", rows)
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    text = (tmp_path / "s" / "report.md").read_text()
    said = [line for line in text.splitlines() if "OPT-125M | TTQ r=16 | 3 |" in line]
    assert ["alpha 0.75" in line for line in said] == [False, True]
    assert not any("alpha 0.5," in line for line in said)


def test_nothing_of_the_paper_to_compare_with_is_one_sentence(tmp_path):
    write_rows(tmp_path / "s", [row({"corpus": "c4", "recipe": "none"}, 0)])
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    text = (tmp_path / "s" / "report.md").read_text()
    assert "No row has the method, bits and rank of one of the 50 published cells" in text
    assert "OPT-125M" not in text


def test_two_ways_of_reading_the_prompt_in_one_table_are_said(tmp_path, made):
    cells = [{"corpus": "c4", "recipe": name, "bits": 3, "protocol": "causal", "window": 16,
              "prompt_tokens": 8} for name in ("rtn", "awq", "paper")]  # fmt: skip
    cells[1]["calibration"] = "c4"
    write_rows(tmp_path / "s", [row(cell, 0.1) for cell in cells])
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    text = (tmp_path / "s" / "report.md").read_text()
    assert "Unquantized weights read the prompt (prefill full): rtn, awq." in text
    assert "Quantized weights read it (prefill quantized): paper." in text
    assert "two kinds of prefill" not in (made / "report.md").read_text()


def test_who_does_not_read_an_axis_is_a_horizontal_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or b"")
    rows = [row({"corpus": "c4", "recipe": "none"}, 0)]
    rows.append(row({"corpus": "c4", "recipe": "ttq", "bits": 3}, 0.2))
    rows += [row({"corpus": "c4", "recipe": "awq", "bits": 3, "calibration": "c4",
                  "calibration_tokens": n}, 0.3) for n in (64, 128)]  # fmt: skip
    write_rows(tmp_path / "s", rows)
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    (axes,) = figures[0].axes
    gap = next(s for s in summaries(rows) if s.values["recipe"] == "ttq").gap[0]
    (flat,) = [line for line in axes.lines if line.get_label() == "ttq"]
    np.testing.assert_allclose(flat.get_ydata(), gap)
    matplotlib.pyplot.close("all")


def drawn(monkeypatch, axis, rows):
    """The axes of a picture of `rows` along an axis."""
    figures = []
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or b"")
    pictures.draw_lines(axis, along(summaries(rows), axis), "", {})
    (axes,) = figures[0].axes
    matplotlib.pyplot.close("all")
    return axes


def test_a_gap_of_noise_does_not_stretch_the_picture(monkeypatch):
    rows = [row({"corpus": "c4", "recipe": "none"}, 0)]
    costs = {2: 3.0, 3: 0.3, 4: 0.001}
    rows += [row({"corpus": "c4", "recipe": "rtn", "bits": b}, c) for b, c in costs.items()]
    assert drawn(monkeypatch, "bits", rows[:3]).get_yscale() == "log"
    rows[3]["nll"] = rows[0]["nll"]
    axes = drawn(monkeypatch, "bits", rows)
    assert axes.get_yscale() == "symlog"
    assert -0.1 < axes.get_ylim()[0] < 0


@pytest.mark.parametrize(("values", "scale"), [((0.01, 0.1, 4.0), "log"), ((0.25, 1.0), "linear"),
                                               ((0.0, 4.0), "linear")])  # fmt: skip
def test_a_wide_axis_is_logarithmic(monkeypatch, values, scale):
    rows = [row({"corpus": "c4", "recipe": "ttq", "bits": 3, "lam": lam}, 0.2) for lam in values]
    assert drawn(monkeypatch, "lam", rows).get_xscale() == scale


def test_protocols_have_pictures_of_their_own(tmp_path):
    rows = []
    for protocol in ("window", "causal"):
        place = {"corpus": "c4", "protocol": protocol}
        place |= {"prompt_tokens": 8} if protocol == "causal" else {}
        rows.append(row(place | {"recipe": "none"}, 0))
        rows += [row(place | {"recipe": "rtn", "bits": bits}, 1 / bits) for bits in (2, 3)]
    write_rows(tmp_path / "s", rows)
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "s" / "report").iterdir()}
    assert names == {"bits-m-window.png", "bits-m-causal.png"}
    text = (tmp_path / "s" / "report.md").read_text()
    for protocol in ("window", "causal"):
        _, body = table_under(text, f"Mean gap by bits: m, {protocol}")
        assert body[0] == "rtn"


def test_only_the_paper_s_group_stands_beside_it(tmp_path):
    rows = [
        row({"corpus": c, "recipe": "rtn", "bits": 3, "group_size": g}, 0.3)
        for c in CORPORA for g in (16, 32, 64)
    ]  # fmt: skip
    write_rows(tmp_path / "s", rows)
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    text = (tmp_path / "s" / "report.md").read_text()
    said = [line for line in text.splitlines() if "OPT-125M | RTN | 3 |" in line]
    assert len(said) == 1
    assert "group" not in said[0]


def test_along_bits_a_point_stands_at_the_bits_it_stores(monkeypatch):
    axes = drawn(monkeypatch, "bits", sweep_rows())
    at = [line[0].get_xdata().tolist() for line in axes.containers]
    lines = along(summaries(sweep_rows()), "bits").values()
    assert at == [[bits + 1.0 for bits in line] for line in lines]
    assert "stored" in axes.get_xlabel()


class Checked(html.parser.HTMLParser):
    """Every tag is closed in its order; what is referred to, and what is said, is kept."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href"}:
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_network_and_its_pictures_are_not_blank(made):
    text = (made / "report.html").read_text("utf-8")
    page = Checked()
    page.feed(text)
    page.close()
    assert not page.open
    assert len(page.links) == 2
    assert not re.search(r"https?://|url\(|<script", text)
    kept = {path.read_bytes() for path in (made / "report").iterdir()}
    for link in page.links:
        data = base64.b64decode(link.removeprefix("data:image/png;base64,"))
        assert data in kept, "Markdown shows the same pictures"
        pixels = matplotlib.image.imread(io.BytesIO(data))
        assert np.std(pixels[..., :3]) > 0.05
        assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 20
    markdown = (made / "report.md").read_text("utf-8")
    for name in re.findall(r"\((report/.*?)\)", markdown):
        assert (made / name).exists()


def test_failed_cells_are_listed_and_markup_is_escaped(made):
    header, *body = table_under((made / "report.md").read_text(), "Failed cells")
    assert header == ["cell", "error"]
    assert [cells[1] for cells in body] == [r"Oops: a b \| c"]
    assert "of which 1 failed (listed below)" in (made / "report.md").read_text()


def test_directories_are_reported_together_and_old_pictures_go(tmp_path, capsys):
    rows = sweep_rows()
    for name, part in (("a", rows[::2]), ("b", rows[1::2])):
        write_rows(tmp_path / name, part)
    (tmp_path / "a" / "report").mkdir()
    (tmp_path / "a" / "report" / "old.png").write_bytes(b"")
    words = ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--quiet"]
    assert main([*words, "--no-compilation-cache"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == len(rows)
    assert not (tmp_path / "b" / "report.html").exists()
    assert len(table_under((tmp_path / "a" / "report.md").read_text(), "Results")) == 17
    assert not (tmp_path / "a" / "report" / "old.png").exists()


def test_bad_input(tmp_path, capsys, monkeypatch):
    def said(*words):
        assert main([*words, "--no-compilation-cache", "--quiet"]) == 2
        return capsys.readouterr().err

    assert "expected the rows of a sweep (rows.jsonl), found none" in said("report", str(tmp_path))
    write_rows(tmp_path / "s", sweep_rows())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "ttq-jax[plots]"' in said("report", str(tmp_path / "s"))
