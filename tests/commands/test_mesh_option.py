"""--mesh at the commands that have it."""

import json

import pytest

import ttq_jax as ttq
from ttq_jax.evaluation.continuations import score_continuations
from ttq_jax.evaluation.harness_arguments import load_arguments

CHEAP = ("--recipe", "ttq", "--group-size", 8, "--select", "layers/down")


def test_perplexity_is_that_of_one_device(cli_json, tiny, text_file):
    asked = (
        "perplexity", "--model", tiny, "--corpus", text_file, "--window", 32, "--max-windows", 2,
        "--prompt-tokens", 16, *CHEAP,
    )  # fmt: skip
    (alone,), (shared,) = cli_json(*asked), cli_json(*asked, "--mesh", "data=2,model=4")
    assert shared["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    assert shared["effective_bits"] == alone["effective_bits"]


def test_a_sweep_and_a_prompt_are_for_a_mesh_too(cli_json, cli, tiny, text_file, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f"model = {json.dumps([tiny])}\ncorpus = {json.dumps([text_file])}\nrecipe = ['ttq']\n"
        "group_size = [8, 32]\nselect = ['layers/down']\nwindow = [32]\nmax_windows = [1]\n"
        "prompt_tokens = [16]\n"
    )
    code, _, err = cli("sweep", grid, "--out", tmp_path / "out", "--mesh", "model=4", "--quiet")
    rows = [json.loads(s) for s in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [("error" in row) for row in rows] == [False, True]
    assert "4 devices share the 96 input channels of down, 24 each" in rows[1]["error"]
    assert code == 2, err
    asked = ("generate", "--model", tiny, "--prompt", "Hello", "--max-new-tokens", 4, *CHEAP)
    (alone,), (shared,) = cli_json(*asked), cli_json(*asked, "--mesh", "model=4")
    assert shared["text"] == alone["text"]
    # Piece by piece, of two groups of devices that both read the one prompt, and from the host.
    how = ("--mesh", "data=2,model=4", "--stream", "--dense-memory", "host")
    code, out, err = cli(*asked, *how, "--no-compilation-cache")
    assert code == 0, err
    assert out == f"Hello{alone['text']}\n"
    assert "data=2 of the mesh does not divide a prompt by itself: each of its 2 groups" in err


def test_what_is_compared_and_prepared_on_a_mesh_is_that_of_one_device(
    cli, cli_json, tiny, text_file, tmp_path
):
    asked = ("acceptance", "--model", tiny, "--corpus", text_file, "--window", 32,
             "--prompt-tokens", 16, "--max-windows", 1, *CHEAP)  # fmt: skip
    (alone,), (shared,) = cli_json(*asked), cli_json(*asked, "--mesh", "model=4")
    for measure in ("greedy", "sampled", "divergence"):
        assert shared[measure] == pytest.approx(alone[measure], rel=1e-4), measure
    fixed = ("--recipe", "rtn", "--group-size", 8, "--select", "layers/down")
    store = tmp_path / "store"
    how = ("--mesh", "model=4", "--dense-memory", "host")
    code, _, err = cli("prepare", "--model", tiny, *fixed, "--out", store, *how)
    assert code == 0, err
    answer = ("generate", "--model", tiny, "--prompt", "Hello", "--max-new-tokens", 4, *fixed)
    (plain,), (kept,) = cli_json(*answer), cli_json(*answer, "--prepared", store)
    assert kept["text"] == plain["text"]


def test_texts_are_scored_on_a_mesh_as_on_one_device(tiny):
    recipe, prompt, texts = ttq.preset("rtn", group_size=8, select="layers/q"), [5, 7, 9], [[4, 8]]

    def scored(mesh):
        model = ttq.load(tiny, mesh=mesh)
        offline = ttq.prepare(model, recipe)
        return score_continuations(model, prompt, texts, recipe=recipe, offline=offline)

    ((alone, _),), ((shared, _),) = scored(None), scored({"model": 4})
    assert shared == pytest.approx(alone, rel=1e-5)


def test_lm_eval_s_model_is_on_a_mesh_too(tiny):
    made = load_arguments({"model": tiny, "recipe": "none", "mesh": "model=4"})["model"]
    assert dict(made.mesh.shape) == {"data": 1, "kv": 2, "rep": 2}


@pytest.mark.slow
def test_widths_are_chosen_on_a_mesh_as_on_one_device(cli_json, tiny, text_file, tmp_path):
    asked = ("allocate", "--model", tiny, "--corpus", text_file, "--window", 48, "--recipe", "rtn",
             "--prompt-tokens", 16, "--max-windows", 1, "--budget", 7, "--group-size", 8,
             "--select", "layers/(o|down)", "--widths", 2, 4, "--out", tmp_path / "mine.toml"
             )  # fmt: skip
    (alone,), (shared,) = cli_json(*asked), cli_json(*asked, "--mesh", "model=4")
    assert shared["recipe"] == alone["recipe"]
    assert shared["divergence"] == pytest.approx(alone["divergence"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mesh", "tensor=2"), "mesh: expected sizes of data and model, as in data=2,model=4"),
        (("--mesh", "model=16"), "take 16 devices, and there are 8"),
        (("--mesh", "model=3"), "4 heads, which 3 devices cannot share equally"),
        (("--mesh", "model=4", "--group-size", "64"), "of down, 24 each, and groups of 64 would"),
        (("--processes", "auto"), "--processes: expected --mesh beside it"),
        (("--mesh", "model=2", "--processes", "here:1,2,2"), "INDEX below COUNT, such as 10.0.0.1"),
        (("--mesh", "model=2", "--processes", "2"), "expected auto, or HOST:PORT,COUNT,INDEX"),
    ],
)
def test_what_does_not_fit_is_one_line(cli, tiny, options, said):
    code, out, err = cli("generate", "--model", tiny, "--prompt", "Hi", *CHEAP, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.rstrip().splitlines()[-1].startswith("ttq: error: ")


def test_the_kernels_of_a_device_are_listed(cli_json, cli):
    asked = ("kernels", "--model", "llama-3-8b", "--chip", "v5e", "--bits", 3,
             "--prompt-tokens", 2048)  # fmt: skip
    (whole,), (own,) = cli_json(*asked), cli_json(*asked, "--mesh", "model=8")
    assert own["mesh"] == {"data": 1, "model": 8}
    assert whole["attention"] == {"implementation": "splash", "reason": "the kernel for v5e"}
    assert own["attention"] == {
        "implementation": "splash",
        "reason": "the kernel for v5e, 4 query heads on each device",
    }

    def sizes(found):
        return {r["projection"]: (r["k"], r["n"]) for r in found["kernels"]}

    assert sizes(whole)["down"] == (14336, 4096)
    assert {name: sizes(own)[name] for name in ("q", "k", "o", "gate", "down", "head")} == {
        "q": (4096, 512), "k": (4096, 128), "o": (512, 4096), "gate": (4096, 1792),
        "down": (1792, 4096), "head": (4096, 16032),
    }  # fmt: skip
    assert not any(row["fallback"] for row in own["kernels"])
    # Two of 16 devices have a copy of each key-value head; down has too few rows for 3 bits.
    (many,) = cli_json(*asked, "--mesh", "model=16")
    assert [r["projection"] for r in many["kernels"] if r["fallback"]] == ["down"]
    assert sizes(many)["k"] == (4096, 128)
    code, _, err = cli(*asked, "--mesh", "model=32", "--group-size", 128)
    assert code == 2
    assert "32 devices share the 14336 input channels of down, 448 each" in err
