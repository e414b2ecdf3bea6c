"""Decoding beside other quantizers: rows, who is left out and why, and that they decode alike."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint

import ttq_jax as ttq
from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.models.decoder import plain, unstack
from ttq_jax.types import Offline

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import compare_torch
import compare_torch_speed as speed
import torch_quantizers

PEERS = {"torchao": "int8", "hqq": "4-bit", "qwix": "int4"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a model and a text, and the model in transformers."""
    path = tmp_path_factory.mktemp("tiny")
    reference = write_checkpoint(path, "llama-gqa-untied")
    (path / "text.txt").write_text("".join(f"Line {i}: {i * i}.\n" for i in range(900)))
    return path, reference


def run(tiny, *options):
    path, out = tiny[0], tiny[0] / "speed.json"
    status = speed.main([
        "--model", str(path), "--corpus", f"t={path / 'text.txt'}", "--window", "64",
        "--prompt-tokens", "40", "--windows", "2", "--out", str(out), *options,
    ])  # fmt: skip
    return status, json.loads(out.read_text())


def test_speed_without_the_other_quantizers(tiny, monkeypatch, capsys):
    for package in PEERS:
        monkeypatch.setitem(sys.modules, package, None)
    names = [
        speed.UNQUANTIZED, "ttq_jax ttq 3-bit", speed.TRANSFORMERS,
        *(f"{package} {what}" for package, what in PEERS.items()),
    ]  # fmt: skip
    few = {name: speed.CONTENDERS[name] for name in names}
    monkeypatch.setattr(speed, "CONTENDERS", few)
    monkeypatch.setattr(speed, "NEW_TOKENS", 8)
    status, found = run(tiny, "--turns", "1")
    assert status == 0
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == names[:3]
    assert {"torch", "transformers"} <= set(found["versions"]) and not set(PEERS) & set(
        found["versions"]
    )
    dense, packed, theirs = (rows[name] for name in names[:3])
    assert dense["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    assert abs(packed["perplexity"] / theirs["perplexity"] - 1) > 1e-3
    assert packed["bits"] < 5 and dense["bits"] == theirs["bits"] == 32
    assert (dense["over_unquantized"], theirs["over_transformers"]) == (1, 1)
    for row in rows.values():
        ratio = row["tokens_per_second"] / theirs["tokens_per_second"]
        assert row["over_transformers"] == pytest.approx(ratio, rel=0.02, abs=0.01)
    assert found["left_out"] == {
        f"{package} {what}": f"not installed: pip install {package}"
        for package, what in PEERS.items()
    }
    out = capsys.readouterr().out
    for name, why in found["left_out"].items():
        assert f"left out: {name}: {why}" in out


def test_a_peer_that_breaks_is_listed_and_one_of_ours_is_an_error(monkeypatch):
    def broken(race):
        raise RuntimeError("no kernel\n for this CPU")

    def breaks_later(race):
        return speed.Contender("", lambda limit: partial(broken, None), len, 4.0)

    monkeypatch.setattr(speed, "PEERS", ("json", "ast"))  # two that are installed
    monkeypatch.setattr(speed, "CONTENDERS", {"json a": broken, "ast b": breaks_later})
    ready, left_out = speed.line_up(None)
    why = "does not run here: RuntimeError: no kernel for this CPU"
    assert not ready and left_out == {"json a": why, "ast b": why}
    monkeypatch.setattr(speed, "CONTENDERS", {"ttq_jax c": broken})
    with pytest.raises(RuntimeError, match="no kernel"):
        speed.line_up(None)


def test_the_decoder_that_other_products_run_in_is_the_same_decoder(tiny):
    """With the plain product it gives the tokens of transformers and the score of score_window."""
    path, reference = tiny
    model = ttq.load(str(path))
    window = np.random.default_rng(0).integers(3, model.config.vocab_size, 64).astype(np.int32)
    tree = unstack(model.params)
    made = speed.decode_greedily(
        model.params, tree, jnp.asarray(window[None]), 6,
        config=model.config, project=plain, capacity=8,
    )  # fmt: skip
    with torch.no_grad():
        want = reference.generate(
            compare_torch.as_torch(window)[None], do_sample=False, max_new_tokens=6,
            min_new_tokens=6, pad_token_id=0,
            attention_mask=torch.ones(1, 64, dtype=torch.int64),
        )[0, 64:]  # fmt: skip
    assert made.tolist() == [*want.tolist(), 0, 0]
    score = speed.score_projected(
        model.params, tree, jnp.asarray(window),
        config=model.config, project=plain, prompt_tokens=40,
    )  # fmt: skip
    ours = score_window(
        model.params, jnp.asarray(window), Offline(), config=model.config, recipe=None,
        protocol=Protocol(window=64, prompt_tokens=40),
    )  # fmt: skip
    np.testing.assert_allclose(score, ours, rtol=1e-5)
    jax.clear_caches()


class Packed:
    """A tensor as torchao makes them: a shell around others."""

    def __init__(self, *parts):
        self.parts = dict(zip("ab", parts, strict=True))
        vars(self).update(self.parts)

    def __tensor_flatten__(self):
        return list(self.parts), None


def test_every_stored_byte_counts(tiny):
    model = copy.deepcopy(tiny[1])
    assert speed.torch_bits(model) == 32
    codes, scales = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 2)
    assert speed.stored_bytes(Packed(codes, scales)) == 64 * 32 + 4 * 128
    # HQQ's layers: one q projection of 64 x 64 at 4 bits and 4 bytes per scale and zero point.
    layer = torch.nn.Module()
    layer.W_q, layer.meta = codes, {"scale": scales, "zero": scales, "shape": torch.Size((64, 64))}
    weights = sum(m.weight.numel() for m in torch_quantizers.linears(model).values())
    model.model.layers[0].self_attn.q_proj = layer
    want = (32 * (weights - 64 * 64) + 8 * (64 * 32 + 2 * 512)) / weights
    assert speed.torch_bits(model) == pytest.approx(want)
