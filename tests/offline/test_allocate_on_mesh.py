"""Widths of a mixture of experts that devices share are those that one device chooses."""

import numpy as np
import pytest
from marks import slow_but
from small import in_host, random_rows, small_config, small_params

from ttq_jax.mesh import make_mesh
from ttq_jax.offline.allocate import allocate, measure_widths
from ttq_jax.offline.prior import for_unreached
from ttq_jax.partition import on, shard
from ttq_jax.quant.presets import preset
from ttq_jax.quant.tree import static_factors
from ttq_jax.types import Offline

CONFIG = small_config(
    vocab_size=104, d_model=32, embed_dim=32, n_heads=8, head_dim=8, d_ff=24, n_experts=8,
    experts_per_token=2,
)  # fmt: skip
RECIPE = preset("ttq", group_size=8, rank=1)
WINDOWS = np.asarray(random_rows([32] * 2, vocab=104), np.int32)


def measured(params):
    moments = for_unreached(params, {}, config=CONFIG, reads=RECIPE.reads)
    offline = Offline(moments=moments, low_rank=static_factors(params, RECIPE))
    return measure_widths(
        params, WINDOWS, RECIPE, offline, config=CONFIG, prompt_tokens=12, widths=(2, 4)
    )


@pytest.mark.parametrize(
    ("sizes", "memory"),
    slow_but([((2, 4), "device"), ((1, 8), "host"), ((8, 1), "device")], [((2, 4), "device")]),
)
def test_widths_of_experts_are_those_of_one_device(sizes, memory):
    params = small_params(CONFIG)
    params["layers"]["router"]["embedding"] *= 5.0
    alone = measured(params)
    mesh = make_mesh(dict(zip(("data", "model"), sizes, strict=True)), CONFIG)
    with on(mesh):
        shared = measured(in_host(params, mesh) if memory == "host" else shard(params, mesh))
    for name, errors in alone.errors.items():
        np.testing.assert_allclose(shared.errors[name], errors, rtol=1e-5)
        np.testing.assert_array_equal(shared.bits[name], alone.bits[name])
    total = sum(alone.weights.values())
    low, high = (sum(bits[i] for bits in alone.bits.values()) / total for i in (0, 1))
    for share in (0.25, 0.5, 0.75):
        budget = low + share * (high - low)
        rules = allocate(alone, budget)
        assert {rule.bits for rule in rules} == {2, 4}
        assert allocate(shared, budget) == rules
