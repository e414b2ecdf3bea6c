"""What every function's test asks: packed weights give what the same function gives over the dense
weights that they stand for."""

import jax
import numpy as np

import ttq_jax as ttq
from ttq_jax.functions import dense_tree, is_packed

RECIPE = ttq.preset("ttq", bits=4, group_size=16)


def same_bits(a, b):
    """Two trees hold the same packed weights, bit for bit; their counts of rows may differ."""
    views = lambda tree: [  # noqa: E731
        one.views if is_packed(one) else one for one in jax.tree.leaves(tree, is_leaf=is_packed)
    ]
    pairs = zip(jax.tree.leaves(views(a)), jax.tree.leaves(views(b)), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def both(fn, params, *args, recipe=RECIPE, **how):
    """(what reading gives, the packed tree, what running gives) in one program."""

    @jax.jit
    def program(params, args):
        out, packed = ttq.read(fn, recipe, **how)(params, *args)
        return out, packed, ttq.run(fn)(packed, *args)

    return program(params, args)


def check(fn, params, *args, tolerance=2e-5, **how):
    """Runs one function all three ways; the packed tree.

    Reading gives what the function gives, running what it gives over the fake-quantized weights.
    """
    out, packed, y = both(fn, params, *args, **how)
    plain = jax.jit(fn)
    dense, wanted = plain(params, *args), plain(dense_tree(params, packed), *args)
    out, dense, y, wanted = (np.asarray(first(a), np.float32) for a in (out, dense, y, wanted))
    scale = np.abs(dense).max()
    np.testing.assert_allclose(out, dense, atol=1e-6 * scale, rtol=0)
    np.testing.assert_allclose(y, wanted, atol=tolerance * scale, rtol=0)
    assert np.abs(wanted - dense).max() > max(2 * tolerance, 2e-4) * scale, "nothing was rounded"
    return packed


def first(out):
    """What a function computes; some return a module's state beside it."""
    return out[0] if isinstance(out, tuple) else out


def sites(table):
    """By number, the last parts of the paths of each site's kernels."""
    found = {}
    for row in table:
        if not row.dense:
            found.setdefault(row.site, []).append(row.path)
    return [tuple(dict.fromkeys(paths)) for paths in found.values()]
