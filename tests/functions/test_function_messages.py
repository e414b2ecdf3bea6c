"""What cannot be served is refused, or left dense, with words that say what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from function_checks import RECIPE
from jax.sharding import NamedSharding, PartitionSpec

import ttq_jax as ttq
from ttq_jax.config import ConfigError

X = jax.random.normal(jax.random.key(0), (2, 8, 32))
W = {"kernel": jax.random.normal(jax.random.key(1), (32, 32)) / 6}


def plain(w, x):
    return jnp.tanh(x @ w["kernel"])


@pytest.fixture(scope="module")
def packed():
    return jax.jit(lambda w, x: ttq.read(plain, RECIPE)(w, x)[1])(W, X)


def shapes(fn, *args):
    """Traces a function, which is all that a refusal needs."""
    return jax.eval_shape(fn, *args)


def test_a_packed_kernel_that_is_used_otherwise(packed):
    scaled = ttq.run(lambda w, x: x @ (2.0 * w["kernel"]))
    with pytest.raises(ttq.FunctionError, match=(
        r"(?m)^kernel is packed for a product, but this function also uses it in mul at "
        r"test_function_messages\.py:\d+ \(.*<lambda>\); leave it out of select$"
    )):  # fmt: skip
        shapes(scaled, packed, X)


def test_a_packed_kernel_that_a_loop_changes(packed):
    def fn(w, x):
        step = lambda c, _: ((c[0] * 0.5, c[1] @ c[0]), None)  # noqa: E731
        return jax.lax.scan(step, (w["kernel"], x), None, length=2)[0][1]

    with pytest.raises(ttq.FunctionError, match="uses it in a loop's carry that it changes at"):
        shapes(ttq.run(fn), packed, X)


def test_a_packed_kernel_that_is_read_in_another_way(packed):
    with pytest.raises(ttq.FunctionError, match=(
        r"(?m)^kernel was packed for \(32, 32\) contracted over \(0,\), but here it is read as "
        r"\(32, 32\) contracted over \(0,\) after transpose \(1, 0\); observe the function that "
        "will decode as well$"
    )):  # fmt: skip
        shapes(ttq.run(lambda w, x: x @ w["kernel"].T), packed, X)


def test_rows_that_the_mask_does_not_fit():
    read = ttq.read(plain, RECIPE, where=jnp.ones((2, 9), bool))
    with pytest.raises(ttq.FunctionError, match=(
        r"(?m)^kernel: rows \(2, 8\) of its input at test_function_messages.py:\d+ \(plain\) are "
        r"not those of the mask \(2, 9\); leave it out of select, or read prompts of one length "
        r"without a mask$"
    )):  # fmt: skip
        shapes(read, W, X)


def test_rows_that_are_sorted_by_expert_fit_no_mask():
    w, sizes = {"up": jnp.ones((2, 32, 16))}, jnp.array([9, 7])
    fn = lambda w, x: jax.lax.ragged_dot(x.reshape(16, 32), w["up"], sizes)  # noqa: E731
    with pytest.raises(ttq.FunctionError, match=r"up: rows \(16,\) .* mask \(2, 8\)"):
        shapes(ttq.read(fn, RECIPE, where=jnp.ones((2, 8), bool)), w, X)


def test_parameters_in_a_closure():
    closed = lambda unused, x: plain(W, x)  # noqa: E731
    with pytest.raises(ttq.FunctionError, match=(
        r"(?m)^this function multiplies none of the 1 parameters it was given: they must be its "
        "first argument, not a closure$"
    )):  # fmt: skip
        shapes(ttq.read(closed, RECIPE), W, X)


def test_select_that_matches_nothing():
    with pytest.raises(ttq.FunctionError, match=(
        r"(?m)^select 'layers/.*' matched none of the 1 kernels: kernel$"
    )):  # fmt: skip
        ttq.kernels(plain, select="layers/.*")(W, X)
    with pytest.raises(ConfigError, match="select: not a regular expression"):
        ttq.kernels(plain, select="(")(W, X)


def test_nothing_that_the_default_select_takes():
    with pytest.raises(ttq.FunctionError, match=(
        r"(?m)^the default select matched none of the 1 kernels: head/kernel$"
    )):  # fmt: skip
        ttq.kernels(lambda w, x: plain(w["head"], x))({"head": W}, X)


def test_hijax_variables():
    with nnx.var_defaults(hijax=True):
        model = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    with pytest.raises(ttq.FunctionError, match=(
        r"^(bias|kernel) is a hijax variable: modules made under nnx.var_defaults\(hijax=True\) "
        "are not served; make them without$"
    )):  # fmt: skip
        ttq.functional(model)


def test_a_module_in_the_place_of_its_function():
    linen, module = nn.Dense(16), nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    for model, instead in ((linen, r"model\.apply"), (module, r"fn of ttq\.functional\(model\)")):
        with pytest.raises(ttq.FunctionError, match=(
            rf"^fn: expected a function .* got the module {type(model).__name__}; pass {instead}$"
        )):  # fmt: skip
            ttq.read(model, RECIPE)(W, X)


def test_a_table_of_the_vocabulary_says_where_it_is_looked_up():
    """Twice: the second time JAX knows `jnp.take` already, and not who calls it."""
    model, tokens = nn.Sequential([nn.Embed(40, 32), nn.Dense(16)]), jnp.zeros((2, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    for _ in range(2):
        table = ttq.kernels(lambda p, t: model.apply(p, t))(params, tokens)
        (why,) = [row.dense for row in table if row.dense]
        assert why.startswith("gather at test_function_messages.py:")


def test_a_bridge_for_what_is_no_module():
    with pytest.raises(
        ttq.Error, match=r"module: expected an nnx.Module \(Linen: pass model.apply"
    ):
        ttq.functional(nn.Dense(3))


@pytest.mark.parametrize("prior", ["weights", "samples"])
def test_priors_that_our_own_decoder_makes(prior):
    recipe = ttq.preset("ttq", moments=ttq.Source(prior=prior, prior_tokens=4.0))
    for make in (ttq.read, ttq.observe):
        with pytest.raises(ConfigError, match=(
            f"^moments.prior = '{prior}' is estimated from the norms of ttq-jax's own decoder; for "
            r"a function of yours choose a corpus or none: preset\(…, moments='prompt'\)$"
        )):  # fmt: skip
            make(plain, recipe)


@pytest.mark.parametrize(
    ("choice", "remedy"),
    [
        ({"prefill": "quantized"}, "own weights read the prompt"),
        ({"batch": "per_prompt"}, "use jax.vmap"),
        ({"widths": (ttq.Width(select="layers/q", bits=2),)}, "recipes of their own"),
        ({"select": "layers/q"}, "pass select to read or observe"),
        ({"moments": ttq.Source(decay=0.5)}, "scaled"),
        ({"moments": ttq.Source(refresh=4)}, "quantize again"),
    ],
)
def test_choices_that_are_our_own_decoders(choice, remedy):
    (name,) = choice
    with pytest.raises(ConfigError, match=rf"^{name}.* is for ttq-jax's own decoder.*{remedy}"):
        ttq.read(plain, ttq.preset("ttq", **choice))


def test_a_recipe_that_quantizes_nothing():
    with pytest.raises(ttq.Error, match="recipe: expected a Recipe"):
        ttq.read(plain, ttq.preset("none"))


def test_a_corpus_is_observed_and_not_read():
    with pytest.raises(ConfigError, match="observe a corpus, and quantize"):
        ttq.read(plain, ttq.preset("awq"))


def test_a_prior_that_is_missing_or_useless():
    recipe = ttq.preset("ttq", moments=ttq.Source(prior="corpus", prior_tokens=4.0))
    with pytest.raises(ConfigError, match="prior is missing; pass what observe gave on a corpus"):
        ttq.read(plain, recipe)
    observed = ttq.observe(plain, RECIPE)(W, X)[1]
    with pytest.raises(ConfigError, match="prior is given; leave it out"):
        ttq.read(plain, RECIPE, prior=observed)


def test_tables_that_stay_dense_are_said():
    def fn(w, x):
        return plain(w["block"], x) @ w["lm_head"]

    w = {"block": W, "lm_head": jnp.ones((32, 40))}
    with pytest.warns(UserWarning, match=(
        "^head = 8 packs the vocabulary's tables of ttq-jax's own decoder; of this function stay "
        "dense: lm_head; set head=None to say so$"
    )):  # fmt: skip
        shapes(ttq.read(fn, ttq.preset("ttq", head=8)), w, X)


def test_groups_that_are_wider_than_every_input():
    with pytest.raises(ConfigError, match="group size: expected at most 32"):
        shapes(ttq.read(plain, ttq.preset("ttq", group_size=64)), W, X)


def test_a_packed_tree_in_the_plain_function(packed):
    with pytest.raises(TypeError, match=r"kernel is packed and no array; run .* ttq.run\(fn\)"):
        plain(packed, X)
    with pytest.raises(TypeError, match=r"kernel is packed and no array; run .* ttq.run\(fn\)"):
        packed["kernel"][0]
    with pytest.raises(AttributeError, match=r"no 'astype', for it is no array; .* ttq.run\(fn\)"):
        packed["kernel"].astype(jnp.float32)


def test_a_packed_tree_is_read_again(packed):
    for again in (ttq.read(plain, RECIPE), ttq.observe(plain, RECIPE), ttq.kernels(plain)):
        with pytest.raises(
            ttq.FunctionError, match="params: expected dense parameters, got packed"
        ):
            again(packed, X)


def test_a_dense_tree_is_run():
    with pytest.raises(ttq.FunctionError, match="run: expected a tree with packed parameters"):
        ttq.run(plain)(W, X)


def test_a_tree_that_was_not_observed():
    observed = ttq.observe(plain, RECIPE)(W, X)[1]
    with pytest.raises(ttq.FunctionError, match="kernel: expected the tree that was observed"):
        ttq.quantize({"other": W["kernel"]}, observed, RECIPE)


def test_observations_of_functions_that_read_differently():
    two = {"a": W["kernel"], "b": W["kernel"]}
    shared = ttq.observe(lambda w, x: x @ w["a"] + x @ w["b"], RECIPE)(two, X)[1]
    apart = ttq.observe(lambda w, x: x @ w["a"] @ w["b"], RECIPE)(two, X)[1]
    with pytest.raises(
        ttq.Error, match=r"^a: .* shares an input with a, b in one and with a in the"
    ):
        shared + apart


def test_kernels_of_sharded_code_say_so():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    part = PartitionSpec()
    inner = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(part, part), out_specs=part)
    table = ttq.kernels(lambda w, x: plain(w, inner(w["up"], x)))(W | {"up": W["kernel"]}, X)
    (why,) = [row.dense for row in table if row.path == "up"]
    assert why.startswith("shard_map at test_function_messages.py:")
    assert why.endswith("kernels of sharded code are not packed")
    assert "dense: shard_map" in str(table)


def test_a_parameter_on_explicit_axes_is_refused_by_name():
    axis = jax.sharding.AxisType.Explicit
    mesh = jax.sharding.AbstractMesh((2,), ("model",), axis_types=(axis,))
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = NamedSharding(mesh, PartitionSpec(None, "model"))
        w = {"kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=sharded)}
        with pytest.raises(ttq.FunctionError, match=(
            r"(?m)^kernel is sharded over explicit axes of a mesh .*: expected automatic ones"
        )):  # fmt: skip
            shapes(ttq.read(plain, RECIPE), w, X)


def test_a_parameter_that_may_be_sharded_is_said():
    """Along automatic axes an array's layout is no part of its type."""
    axis = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((2,), ("model",), axis_types=(axis,))
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = NamedSharding(mesh, PartitionSpec(None, "model"))
        w = {"kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=sharded)}
        with pytest.warns(UserWarning, match=(
            r"^kernel and 0 other parameters are on a mesh of automatic axes, \{'model': 2\}: .*; "
            r"pass shardings=jax.tree.map\(lambda a: a.sharding, params\), made outside of it"
        )):  # fmt: skip
            shapes(ttq.read(plain, RECIPE), w, X)


def test_a_linen_model_refuses_a_packed_tree():
    model = nn.Dense(16)
    variables = model.init(jax.random.key(0), X)
    packed = ttq.read(model.apply, RECIPE)(variables, X)[1]
    with pytest.raises(Exception, match=r"shape|packed"):
        model.apply(packed, X)
    assert np.isfinite(ttq.run(model.apply)(packed, X)).all()
