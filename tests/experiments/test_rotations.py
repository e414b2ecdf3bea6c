"""`experiments/rotations.py`: a rotated model is the same function."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_rows, small_config, small_params

from ttq_jax.checkpoint.model import Model
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import rotations

MIXTURE = {"n_experts": 2, "experts_per_token": 1}


def model_of(**changes):
    config = small_config(**changes)
    params = small_params(config)
    # Scales of norms that are all 1 could be left out unseen.
    rng = np.random.default_rng(0)
    uneven = {
        name: {"scale": jnp.asarray(rng.uniform(0.5, 2, leaf["scale"].shape), jnp.float32)}
        for name, leaf in params["layers"].items()
        if "scale" in leaf
    }
    params = params | {
        "layers": params["layers"] | uneven,
        "final_norm": {"scale": jnp.linspace(0.5, 2, config.d_model)},
    }
    tokenizer = SimpleNamespace(vocab_size=config.vocab_size, bos_id=None)
    return Model(config=config, params=params, tokenizer=tokenizer, name="tiny", eos_ids=())


def scores(model):
    tokens = jnp.asarray(random_rows([20], seed=3), jnp.int32)
    valid = jnp.ones(tokens.shape, bool)
    cache = empty_cache(model.config, 1, 20, jnp.float32)
    hidden = forward(model.config, model.params, tokens, valid, cache, slots=20)[0]
    return logits(model.config, model.params, hidden)


@pytest.mark.parametrize("width", [8, 48, 72, 7])
def test_the_matrix_is_orthogonal_and_mixes_blocks(width):
    by = rotations.hadamard(width, seed=0)
    np.testing.assert_allclose(by @ by.T, np.eye(width), atol=1e-6)
    block = width & -width
    assert (np.count_nonzero(by, axis=0) == block).all()
    assert (by != rotations.hadamard(width, seed=1)).any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", rotations.KINDS)
def test_a_rotated_model_is_the_same_function(kind, tied):
    model = model_of(tie_embeddings=tied)
    turned = rotations.rotated(model, kind)
    np.testing.assert_allclose(scores(turned), scores(model), rtol=1e-3, atol=1e-4)
    moved = {"residual": "q", "heads": "o", "rotated": "down"}[kind]
    old, new = (m.params["layers"][moved]["kernel"] for m in (model, turned))
    assert float(jnp.mean(jnp.abs(old - new))) > 0.01
    sizes = [jax.tree.map(jnp.shape, m.params["layers"]) for m in (model, turned)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("change", [{"norm": "rms_plus_one"}, {"norm_placement": "post"}, MIXTURE])
def test_norms_that_stand_in_between_are_refused(change):
    config = dataclasses.replace(small_config(), **change)
    model = dataclasses.replace(model_of(), config=config)
    with pytest.raises(SystemExit, match="expected RMS norms without a 1 added, in front of"):
        rotations.rotated(model, "residual")
