"""Reports: their numbers are those of the rows, and only what can be compared is compared."""

import re

import numpy as np
import pytest
from report_rows import CORPORA, report_of, row, sweep_rows, write_rows
from report_tables import table_under

from ttq_jax.commands.main import main
from ttq_jax.sweeps.published import PUBLISHED
from ttq_jax.sweeps.tables import best_of, summaries


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    report_of(directory, sweep_rows())
    return directory


METHODS = {"unquantized": "none", "RTN": "rtn", "TTQ": "ttq", "AWQ": "awq"}
NAMES = {"WikiText-2": "wikitext2", "PTB": "ptb", "C4": "c4"}


def test_the_results_are_those_of_the_rows(made):
    header, *body = table_under((made / "report.md").read_text(), "Results: m, window protocol")
    means = ["geometric mean", "gap", "95 % interval"]
    assert header == ["recipe", "bits", *NAMES, *means]
    rows = {(r["cell"]["recipe"], r["cell"].get("bits"), r["cell"].get("calibration"),
             r["cell"]["corpus"]): r for r in sweep_rows() if "error" not in r}  # fmt: skip
    assert len(body) == 1 + 3 * 5
    for name, bits, *numbers, mean, gap, ends in body:
        width, calibration = re.search(r"(\d)-bit", name), re.search(r"on ([\w-]+)", name)
        key = (METHODS[re.split(r" cal|, ", name)[0]], width and int(width[1]),
               calibration and NAMES[calibration[1]])  # fmt: skip
        want = [rows[*key, c]["perplexity"] for c in CORPORA]
        np.testing.assert_allclose([*map(float, numbers)], want, atol=0.006)
        assert float(mean) == pytest.approx(np.exp(np.mean(np.log(want))), abs=0.006)
        if key[0] == "none":
            assert (gap, ends, float(bits)) == ("", "", 32)
            continue
        plain = [rows["none", None, None, c]["perplexity"] for c in CORPORA]
        shown = float(gap.strip("*"))
        assert shown == pytest.approx(np.mean(np.divide(want, plain)) - 1, abs=6e-4)
        low, high = map(float, re.findall(r"[\d.]+", ends))
        assert low <= shown <= high


def test_every_column_has_one_number_of_digits(made, tmp_path):
    rows = [row({"corpus": "c4", "recipe": name, **({} if name == "none" else {"bits": 2})}, extra)
            for name, extra in (("none", 0), ("rtn", 7.0), ("ttq", -0.00001))]  # fmt: skip
    rows[2] |= {"nll": [n - 1e-7 for n in rows[0]["nll"]], "perplexity": rows[0]["perplexity"]}
    for text in ((made / "report.md").read_text(), report_of(tmp_path / "s", rows)):
        _, *body = table_under(text, "Results: m")
        for column in list(zip(*body, strict=True))[1:]:
            found = re.findall(r"\d\.(\d+)", " ".join(column))
            assert len(set(map(len, found))) == 1
        assert "-0.000" not in text


def best_in(rows):
    return {(one.values["recipe"], one.values["bits"]) for one in best_of(summaries(rows))}


def test_only_what_costs_the_same_is_best():
    """TTQ is marked at each width; what costs less, or more, is no rival of it."""
    rows = sweep_rows()
    assert best_in(rows) == {("ttq", 2), ("ttq", 3), ("ttq", 4)}
    for r in rows:
        if r["cell"]["recipe"] == "ttq":
            r["effective_bits"] -= 0.06
    assert best_in(rows) == set()


def test_no_mark_without_an_interval_or_within_one():
    rows = [r for r in sweep_rows() if r["cell"]["recipe"] != "awq"]
    few = [r | {"nll": r["nll"][:2], "windows": 2} for r in rows if "nll" in r]
    assert all(one.interval is None for one in summaries(few))
    assert best_in(few) == set()
    rng = np.random.default_rng(0)
    noise = [
        r | {"nll": list(np.array(r["nll"]) + rng.normal(0, 9, 6))} for r in rows if "nll" in r
    ]
    assert best_in(noise) < best_in(rows)


def test_nothing_is_best_that_a_cheaper_recipe_beats():
    rows = [r for r in sweep_rows() if r["cell"]["recipe"] != "awq" and r["cell"].get("bits") != 4]
    worse = {3: 5.0, 2: 0.0}
    for r in rows:
        if r["cell"]["recipe"] == "ttq":
            r["nll"] = [n + worse[r["cell"]["bits"]] for n in r["nll"]]
    for r in rows:
        if r["cell"]["recipe"] == "rtn" and r["cell"]["bits"] == 3:
            r["nll"] = [n + 30 for n in r["nll"]]
    assert best_in(rows) == {("ttq", 2)}


def test_a_quantized_file_is_named_and_its_grid_is_never_best(tmp_path):
    rows = []
    for corpus in CORPORA:
        rows.append(row({"corpus": corpus, "recipe": "none"}, 0, model="smollm2"))
        for recipe, extra in (("rtn", 0.0), ("ttq", 0.3)):
            for bits, group in ((4, 32), (4, 64)):
                point = {"corpus": corpus, "recipe": recipe, "bits": bits, "group_size": group}
                cost = extra if group == 32 else 0.3 - extra / 2
                rows.append(row(point, cost, model="smollm2"))
    text = report_of(tmp_path / "s", rows)
    assert "Results: SmolLM2-135M-Instruct, Q4_1 file, 4-bit, window protocol" in text
    assert text.count("Its weights were already rounded in the file (Q4_1)") == 1
    _, *body = table_under(text, "Results: ")
    shown = {cells[0]: cells[-2] for cells in body}
    assert [name.endswith("†") for name in shown] == ["groups of 32" in name for name in shown]
    assert not any("**" in gap for name, gap in shown.items() if name.endswith("†"))
    assert "**" in shown["TTQ, groups of 64"]


def test_a_format_that_the_row_says_counts_and_none_is_guessed(tmp_path):
    rows = [row({"corpus": c, "recipe": "none"}, 0) | {"model": {"format": "Q5_0"}}
            for c in CORPORA]  # fmt: skip
    assert "Results: m, Q5_0 file, window" in report_of(tmp_path / "s", rows)
    plain = [row({"corpus": "c4", "recipe": "none"}, 0, model="mine.gguf")]
    text = report_of(tmp_path / "t", plain)
    assert "Results: mine.gguf, window" in text
    assert "already rounded" not in text


def test_where_one_corpus_dominates_a_geometric_mean_stands_beside(made, tmp_path):
    assert "geometric gap" not in (made / "report.md").read_text()
    rows = [row({"corpus": c, "recipe": "none"}, 0) for c in CORPORA]
    costs = dict(zip(CORPORA, (0.1, 0.2, 3.0), strict=True))
    rows += [row({"corpus": c, "recipe": "rtn", "bits": 2}, cost) for c, cost in costs.items()]
    header, _, cells = table_under(report_of(tmp_path / "s", rows), "Results: m")
    shown = dict(zip(header, cells, strict=True))
    assert float(shown["geometric gap"]) == pytest.approx(np.exp(np.mean([0.1, 0.2, 3.0])) - 1, 0.1)
    assert float(shown["gap"]) > 2 * float(shown["geometric gap"])


def test_few_windows_have_no_interval_and_the_reason_is_said(tmp_path):
    few = [r | {"nll": r["nll"][:2], "windows": 2} for r in sweep_rows() if "nll" in r]
    for r in few:
        r["perplexity"] = float(np.exp(sum(r["nll"]) / r["scored"] / 2))
    text = report_of(tmp_path / "s", few)
    assert "95 % interval" not in table_under(text, "Results: m")[0]
    assert "No 95 % interval, and no best: 2 windows per corpus are too few." in text


def test_the_whole_model_s_bits_stand_beside_the_linear_layers(tmp_path):
    rows = [row({"corpus": c, "recipe": "ttq", "bits": 3}, 0.1) for c in CORPORA]
    header, *_ = table_under(report_of(tmp_path / "s", rows), "Results: m")
    assert "bits, whole model" not in header
    header, body = table_under(
        report_of(tmp_path / "s", [r | {"model_bits": 10.125} for r in rows]), "Results: m"
    )
    assert dict(zip(header, body, strict=True))["bits, whole model"] == "10.12"


def test_a_gap_needs_the_same_windows():
    rows = sweep_rows()
    assert all(s.gap is not None for s in summaries(rows) if not s.is_plain)
    fewer = [r | {"nll": r["nll"][:3]} if r["cell"]["recipe"] == "none" else r for r in rows]
    assert not any(s.gap for s in summaries(fewer))
    without = [r for r in rows if r["cell"]["recipe"] != "none"]
    assert not any(s.gap for s in summaries(without))


def test_along_an_axis(made):
    text = (made / "report.md").read_text()
    header, *body = table_under(text, "Mean gap by bits: m,")
    assert header == ["bits", "2", "3", "4"]
    shown = {cells[0]: [float(c.strip("*")) for c in cells[1:]] for cells in body}
    assert len(shown) == 5
    for values in shown.values():
        assert values == sorted(values, reverse=True)


def test_domain_shift_is_the_first_picture_and_its_contest_is_counted(made):
    text = (made / "report.md").read_text()
    assert re.search(r"!\[.*?\]\((.*?)\)", text)[1] == "report/domains_0.svg"
    header, *body = table_under(text, "Domain shift")
    assert len(body) == 3 * 2
    for cells in body:
        contest = dict(zip(header, cells, strict=True))
        assert contest["of pairs"] == "6"
        # Calibrated elsewhere AWQ costs 3, the prompt 2, RTN 4, with noise far below that.
        assert contest["better in"] == ("0" if contest["against"] == "TTQ" else "6")


def test_every_published_cell_stands_beside_ours(made):
    header, *body = table_under((made / "report.md").read_text(), "Beside the paper")
    assert len(PUBLISHED) == 50
    published = [cells[0] for cells in body]
    for cell in PUBLISHED:
        assert f"{cell.table}: {cell.model}" in published
    ours = [dict(zip(header, cells, strict=True)) for cells in body if cells[6]]
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
    ours = [dict(zip(header, cells, strict=True)) for cells in body if cells[6]]
    exact = [one for one in ours if one["published"] == "Table 3: OPT-125M"]
    assert [(one["method"], one["bits"], one["paper"]) for one in exact] == [
        ("RTN", "3", "56.3"), ("TTQ r=16", "3", "35.8"),
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
              "prompt_tokens": 8} for name in ("rtn", "awq", "paper", "ttq")]  # fmt: skip
    cells[1]["calibration"] = "c4"
    cells[3]["prefill"] = "both"
    write_rows(tmp_path / "s", [row(cell, 0.1) for cell in cells])
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 0
    text = (tmp_path / "s" / "report.md").read_text()
    assert "Unquantized weights read the prompt (prefill full or both): RTN, AWQ, TTQ." in text
    assert "Quantized weights read it (prefill quantized): TTQ as published." in text
    assert "two kinds of prefill" not in (made / "report.md").read_text()


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
    assert names == {f"bits-m-{p}.{kind}" for p in ("window", "causal") for kind in ("svg", "pdf")}
    text = (tmp_path / "s" / "report.md").read_text()
    for protocol in ("window", "causal"):
        _, body = table_under(text, f"Mean gap by bits: m, {protocol} protocol")
        assert body[0] == "RTN"


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
