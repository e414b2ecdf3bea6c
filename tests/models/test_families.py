"""A whole answer from every kind of block: read, quantized and decoded."""

import numpy as np
import pytest
from marks import slow_but
from tiny_models import write_checkpoint

import ttq_jax as ttq

# Those whose blocks differ from Llama's in more than names.
VARIANTS = ("gemma2", "phi3", "smollm3-list-sliding", "olmo2", "granite", "olmoe")


@pytest.fixture(scope="module", params=slow_but(VARIANTS, ("gemma2", "olmoe")))
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(directory, request.param)
    return ttq.load(directory)


def test_eight_bits_answer_as_the_unquantized_weights(model):
    windows = np.random.default_rng(0).integers(0, 256, (2, 48)).astype(np.int32)
    protocol = ttq.Protocol(window=48, prompt_tokens=24)
    plain = ttq.perplexity(model, windows, recipe=None, protocol=protocol).perplexity
    for recipe in (ttq.preset("rtn", bits=8, group_size=32), ttq.preset("ttq", bits=8)):
        score = ttq.perplexity(model, windows, recipe=recipe, protocol=protocol)
        assert score.perplexity == pytest.approx(plain, rel=0.01)


def test_a_prior_from_the_weights_serves(model):
    prior = ttq.Source(prior="weights", prior_tokens=8.0)
    recipe = ttq.preset("ttq", bits=3, group_size=32, moments=prior)
    made = ttq.generate(model, ["one", "another prompt"], recipe=recipe, max_new_tokens=4)
    assert [len(t) for t in made.tokens] == [4, 4] or "end" in made.stopped
    assert 3 < made.effective_bits < 5
