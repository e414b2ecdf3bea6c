"""`--prefill-chunk` and `--cache-dtype`, wherever a prompt is read."""

import pytest

from ttq_jax.sweeps.rows import read_rows


def test_answers_and_scores_are_the_same(cli, cli_json, tiny, text_file):
    ask = ["generate", "--model", tiny, "--prompt", "Once upon a time " * 3, "--max-new-tokens", 6,
           "--cache-dtype", "int8", "--recipe", "none"]  # fmt: skip
    (plain,) = cli_json(*ask)
    assert plain["prompt_tokens"] > 40
    assert plain["cache_dtype"] == "int8"
    assert "prefill_chunk" not in plain
    code, out, err = cli(*ask, "--prefill-chunk", 20, "--stream")
    assert code == 0, err
    assert out == plain["prompt"] + plain["text"] + "\n"
    score = ["perplexity", "--model", tiny, "--corpus", text_file, "--window", 32,
             "--protocol", "window", "--max-windows", 1, "--recipe", "none"]  # fmt: skip
    whole, parts = (cli_json(*score, *more)[0] for more in ([], ["--prefill-chunk", 12]))
    assert parts["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    assert (parts.get("prefill_chunk"), whole.get("prefill_chunk")) == (12, None)


def test_a_sweep_scores_over_every_cache(cli, tiny, text_file, tmp_path):
    path, out = tmp_path / "sweep.toml", tmp_path / "out"
    path.write_text(
        f'model = "tiny={tiny}"\ncorpus = "{text_file}"\nrecipe = "none"\nwindow = 16\n'
        'prompt_tokens = 8\nmax_windows = 1\ncache_dtype = ["float32", "int8"]\n'
    )
    code, _, err = cli("sweep", path, "--out", out, "--no-compilation-cache")
    assert code == 0, err
    exact, coded = (row["perplexity"] for row in read_rows(out).values())
    assert coded == pytest.approx(exact, rel=0.05)
    assert coded != exact


@pytest.mark.parametrize("command", ["generate", "chat", "perplexity", "plan"])
def test_every_command_refuses_what_it_cannot_do(cli, tiny, text_file, command):
    words = {
        "generate": ["--model", tiny, "--prompt", "x"], "chat": ["--model", tiny],
        "perplexity": ["--model", tiny, "--corpus", text_file],
        "plan": ["--model", "llama-3-8b", "--chip", "v5e", "--arithmetic"],
    }[command]  # fmt: skip
    code, _, err = cli(command, *words, "--prefill-chunk", 200)
    assert code == 2
    assert "prefill_chunk: expected up to 128 tokens or a multiple of 128" in err
    code, _, err = cli(command, *words, "--prefill-chunk", 64, "--recipe", "paper")
    assert code == 2
    assert "set prefill to full, as ttq, fast and best do" in err


def test_a_plan_counts_the_parts(cli_json):
    words = ["plan", "--model", "llama-3-8b", "--chip", "v6e", "--prompt-tokens", 8192,
             "--arithmetic"]  # fmt: skip
    (whole,), (parts,) = (cli_json(*words, *more) for more in ([], ["--prefill-chunk", 1024]))
    stream, units, logits = 4096 * 2, (4096 + 2 * 14336) * 2, 4 * 128256
    assert whole["device"]["temporaries"] == 8192 * units + logits
    assert parts["device"]["temporaries"] == 8192 * stream + 1024 * units + logits
    first, more = (row["first_token_seconds"] for row in (whole, parts))
    # Eight parts read the blocks, and quantizing once more.
    blocks = whole["device"]["dense"] / whole["speeds"]["memory"]
    assert more["read"] == pytest.approx(first["read"] + 8 * blocks)
    assert more["multiply"] == first["multiply"]
    (coded,) = cli_json(*words, "--cache-dtype", "int8")
    slots = 2 * 32 * 8 * (8192 + 128)
    assert whole["device"]["cache"] - coded["device"]["cache"] == slots * (2 * 128 - 128 - 4)
    assert whole["bytes_per_token"] - coded["bytes_per_token"] == slots * (128 - 4)
    (host,) = cli_json(*words, "--prefill-chunk", 1024, "--dense-memory", "host")
    assert host["first_token_seconds"]["read"] == pytest.approx(
        2 * host["host"] / host["speeds"]["host_link"]
    )
