"""The committed sweeps: every cell is legal, and they run on what the hub's layout holds."""

import json
from pathlib import Path

import pytest
from tiny_files import write_model

from ttq_jax.commands.main import main
from ttq_jax.sweeps.axes import read_sweep
from ttq_jax.sweeps.rows import read_rows

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = sorted([*EXPERIMENTS.glob("paper/*.toml"), *EXPERIMENTS.glob("*.toml")])


def test_all_are_there():
    assert len(FILES) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_cell_is_legal_and_every_file_says_what_to_expect(path):
    cells = read_sweep(str(path))
    assert len(cells) > 40 or path.stem in {"protocols", "ranking"}
    assert not [cell.name() for cell in cells if cell.error]
    text = path.read_text()
    for word in ("# Claim ", "# Command ", "# Cost ", "# Expect "):
        assert word in text
    assert f"ttq sweep experiments/{path.relative_to(EXPERIMENTS)} --out DIR" in text


def hub_dataset(root: Path, name: str) -> str:
    """A dataset in the hub's layout, as `datasets` reads it."""
    data = root / name / "data"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        lines = (json.dumps({"text": f"{name} {i}: {i * len(name)}."}) for i in range(300))
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return f"hf:{root / name}"


@pytest.mark.parametrize(
    ("path", "rows"), [("paper/table3.toml", {"none", "rtn", "awq", "paper"}),
                       ("domain_shift.toml", {"none", "ttq", "fast", "best", "awq", "gptq"})]
)  # fmt: skip
def test_they_run_from_the_hub_s_layout(tmp_path, monkeypatch, path, rows):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ("wikitext2", "ptb", "c4")
    texts = {name: hub_dataset(tmp_path, name) for name in names}
    model = write_model(tmp_path / "opt-125m")
    changes = {
        "model": str(model), "bits": "3", "window": "48", "prompt_tokens": "24",
        "max_windows": "1", "protocol": "window", "calibration_tokens": "64",
        "corpus": ",".join(f"{n}={t}" for n, t in texts.items()),
        "calibration": f"c4={texts['c4']}:train,ptb={texts['ptb']}:train",
    }  # fmt: skip
    words = [word for key, value in changes.items() for word in ("--axis", f"{key}={value}")]
    out = tmp_path / "out"
    assert main(["sweep", str(EXPERIMENTS / path), "--out", str(out), *words, "--quiet",
                 "--no-compilation-cache"]) == 0  # fmt: skip
    found = read_rows(out).values()
    assert {row["cell"]["recipe"] for row in found} == rows
    assert {row["cell"]["corpus"] for row in found} == set(names)
    assert not [row for row in found if "error" in row]
    assert main(["report", str(out), "--quiet", "--no-compilation-cache"]) == 0
    report = (out / "report.md").read_text()
    # The tiny model has the name of one of the paper's, and AWQ at 3 bits is a cell of both files.
    (awq, *_) = [
        line for line in report.splitlines() if line.startswith("| Table 3: OPT-125M | AWQ | 3 |")
    ]
    assert "not run" not in awq
    assert "report/domains_0.svg" in report
