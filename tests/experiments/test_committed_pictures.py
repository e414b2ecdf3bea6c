"""The committed pictures of experiments are what the commands in the scripts' docstrings make."""

import sys
from pathlib import Path

import matplotlib
import pytest
from pictures import same_picture

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
sys.path.insert(0, str(RESULTS.parent))
import learned_recipe  # noqa: E402
import quality  # noqa: E402
import query_projection  # noqa: E402

COMMANDS = {
    "frontier": (
        quality,
        ["report", *(RESULTS / f"{kind}_{m}.jsonl" for kind in ("quality", "default")
                     for m in ("smollm2", "gemma3")),
         "--windows", "40", "--only", "ttq-3", "ttq-3-r16", "awq-4-g64-sym@c4",
         "gptq-4-g64-sym@c4", "best-n0", "best", "fast-p1-f4-h0",
         "experiments/recipes/gemma3_5.01.toml"],
    ),
    "query_projection": (
        query_projection,
        ["--results", *(RESULTS / f"query_projection_{c}.json" for c in ("v5e", "v6e", "cpu"))],
    ),
    "learned_recipe_smollm2": (
        learned_recipe,
        ["report", RESULTS / "learned_recipe_scores.jsonl", "--learned",
         *sorted(RESULTS.glob("learned_recipe_wikitext2_*.json"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_its_command_makes_it(name, tmp_path, monkeypatch, capsys):
    script, words = COMMANDS[name]
    picture = tmp_path / f"{name}.svg"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words), "--picture", str(picture)])
    script.main()
    assert same_picture((RESULTS / picture.name).read_text(), picture.read_text())
    assert (RESULTS / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    docstrings = [(RESULTS.parent / f"{s}.py").read_text() for s in
                  ("quality", "query_projection", "learned_recipe")]  # fmt: skip
    assert any(f"experiments/results/{name}.svg" in text for text in docstrings)


def test_every_picture_has_a_command():
    assert {path.stem for path in RESULTS.glob("*.svg")} == set(COMMANDS)
    assert {path.stem for path in RESULTS.glob("*.pdf")} == set(COMMANDS)
    assert not list(RESULTS.rglob("*.png"))


def test_a_moved_line_is_another_picture():
    kept = f'Matplotlib v{matplotlib.__version__}, url(#p0123456789) "M 1.500001 2.5" p0123456789'
    assert same_picture(kept, kept.replace("p0123456789", "pabcdefabcd").replace("01 ", "02 "))
    assert not same_picture(kept, kept.replace("2.5", "2.501"))
    assert not same_picture(kept, kept.replace("p0123456789)", "pabcdefabcd)"))
    assert not same_picture(kept, kept.replace("M", "L"))
    assert same_picture(kept.replace("Matplotlib v", "Matplotlib v0."), "another")
