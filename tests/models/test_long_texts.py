"""Texts longer than a sliding window and than a block of queries, against transformers."""

import numpy as np
import pytest
from parity import assert_same_logits
from tiny_models import VARIANTS, VOCAB, make_model, write_tokenizer

from ttq_jax.checkpoint import load

WINDOW = 512


# 640 tokens are five blocks of queries, 700 are none.
@pytest.mark.parametrize(
    ("variant", "length"), [("gemma3", 700), ("gemma3", 640), ("mistral-window", 640)]
)
def test_beyond_the_window(variant, length, tmp_path, monkeypatch):
    kind, base = VARIANTS[variant]
    long = {"sliding_window": WINDOW, "max_position_embeddings": 1024}
    monkeypatch.setitem(VARIANTS, "here", (kind, base | long))
    reference = make_model("here")
    reference.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = load(tmp_path)
    assert model.config.sliding_window == WINDOW
    tokens = np.random.default_rng(3).integers(2, VOCAB, (1, length))
    assert_same_logits(reference, model, tokens)
