"""Models of every kind, tiny, and what is done with a packed tree: encoders of images and of text,
a mixture of experts, decoders with Flax's own caches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from function_checks import RECIPE, both, check, same_bits, sites

import ttq_jax as ttq
from ttq_jax.functions import dense_tree, effective_bits, is_packed
from ttq_jax.types import stored_bytes


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(h, mask=mask)
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(48, name="up")(nn.LayerNorm()(x))))


class Vision(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, 32)
        x = x + self.param("positions", nn.initializers.normal(0.02), (x.shape[1], 32))
        x = EncoderLayer(name="layer")(x)
        return nn.Dense(10, name="classes")(nn.LayerNorm()(x).mean(1))


def test_a_vision_encoder():
    model, images = Vision(), normal(0, 2, 16, 16, 3)
    variables = model.init(jax.random.key(1), images)
    table = ttq.kernels(model.apply)(variables, images)
    dense = {row.path: row.dense for row in table if row.dense}
    assert "conv_general_dilated at test_function_models" in dense["params/patches/kernel"]
    (up,) = [row for row in table if row.path == "params/layer/up/kernel"]
    assert up.source.startswith("test_function_models.py:")
    assert up.source.endswith("(EncoderLayer.__call__)")
    assert "add at" in dense["params/positions"]
    assert len(sites(table)) == 4 + 1
    check(model.apply, variables, images)


class Seeing(nn.Module):
    """An image's patches, then a text that may look at them."""

    @nn.compact
    def __call__(self, image, tokens):
        patches = image.reshape(1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(1, 16, 48)
        seen = EncoderLayer(name="tower")(nn.Dense(32, name="patches")(patches))
        text = nn.Embed(50, 32, name="embed")(tokens)
        x = jnp.concatenate([nn.Dense(32, name="bridge")(seen), text], axis=1)
        place = jnp.arange(x.shape[1])
        mask = (place[None] <= place[:, None]) | (place < 16)[None]
        x = EncoderLayer(name="decoder")(x, mask[None, None])
        return nn.Dense(50, name="head")(x[:, 16:])


def test_a_vision_language_model_answers_from_weights_made_by_an_image_and_a_question():
    model, image = Seeing(), normal(20, 1, 16, 16, 3)
    question = jax.random.randint(jax.random.key(21), (1, 7), 0, 50, jnp.int32)
    variables = model.init(jax.random.key(22), image, question)

    def answer(step, text):
        def body(text, i):
            token = jnp.argmax(step(image, text)[:, i - 1], -1).astype(jnp.int32)
            return text.at[:, i].set(token), token

        return jax.lax.scan(body, text, 7 + jnp.arange(5, dtype=jnp.int32))[1]

    @jax.jit
    def program(variables):
        packed = ttq.read(model.apply, RECIPE)(variables, image, question)[1]
        text = jnp.pad(question, ((0, 0), (0, 5)))
        return packed, answer(lambda *args: ttq.run(model.apply)(packed, *args), text)

    packed, tokens = program(variables)
    found = {leaf.operands[0].path.split("/")[1] for leaf in packed_leaves(packed)}
    assert found == {"tower", "patches", "bridge", "decoder"}
    rounded = dense_tree(variables, packed)
    text = jnp.pad(question, ((0, 0), (0, 5)))
    faked = jax.jit(lambda v: answer(lambda *args: model.apply(v, *args), text))(rounded)
    np.testing.assert_array_equal(tokens, faked)


def packed_leaves(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(leaf)]


class Text(nnx.Module):
    def __init__(self, rngs):
        self.table, self.classes = nnx.Embed(50, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(32, rngs=rngs) for _ in range(2)])
        make = lambda: nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)  # noqa: E731
        self.attention = nnx.List([make() for _ in range(2)])

    def __call__(self, tokens, mask):
        x = self.table(tokens)
        for norm, attention in zip(self.norms, self.attention, strict=True):
            x = x + attention(norm(x), mask=mask[:, None, None])
        return self.classes(jnp.where(mask[..., None], x, 0).sum(1))


def test_a_text_encoder_whose_padding_counts_for_nothing():
    fn, params, rest = ttq.functional(Text(nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 50)
    mask = jnp.arange(9)[None] < jnp.array([6, 9])[:, None]
    run = lambda params, tokens: fn(params, rest, tokens, mask)[0]  # noqa: E731
    select = "attention/.*"
    packed = check(run, params, tokens, where=mask, select=select)
    other = jnp.where(mask, tokens, 7)
    again = both(run, params, other, where=mask, select=select)[1]
    same_bits(packed, again)
    without = both(run, params, other, select=select)[1]
    with pytest.raises(AssertionError):
        same_bits(packed, without)


class Translating(nn.Module):
    """Two layers that attend to one encoded text, which may be padded."""

    @nn.compact
    def __call__(self, source, target, mask):
        x, y = EncoderLayer(name="encoder")(source, mask[:, None, None]), target
        for i in range(2):
            attend = nn.MultiHeadDotProductAttention(num_heads=2, name=f"cross_{i}")
            y = y + attend(y, x, mask=mask[:, None, None])
        return y


def test_an_encoder_decoder_reads_its_text_once_for_all_layers():
    model, source, target = Translating(), normal(12, 2, 9, 32), normal(13, 2, 1, 32)
    mask = jnp.arange(9)[None] < jnp.array([6, 9])[:, None]
    args = jax.eval_shape(model.init, jax.random.key(14), source, target, mask), source, target
    found = sites(ttq.kernels(model.apply)(*args, mask))
    text = [f"params/cross_{i}/{name}/kernel" for i in range(2) for name in ("key", "value")]
    assert tuple(text) in found
    padded = ttq.read(model.apply, RECIPE, where=mask)
    with pytest.raises(ttq.FunctionError, match=r"rows \(2, 1\) .*; leave it out of select"):
        jax.eval_shape(padded, *args, mask)
    padded = ttq.read(model.apply, RECIPE, where=mask, select=".*(encoder/.*|key|value)/kernel")
    assert len(packed_leaves(jax.eval_shape(padded, *args, mask)[1])) == 6 + 2 * 2


class Mixture(nn.Module):
    """Top-1 of 4 experts, tokens sorted by expert for `ragged_dot`."""

    @nn.compact
    def __call__(self, x):
        flat, init = x.reshape(-1, 32), nn.initializers.lecun_normal()
        gates = jax.nn.softmax(nn.Dense(4, name="router", use_bias=False)(flat))
        expert = jnp.argmax(gates, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=4).astype(jnp.int32)
        rows = flat[order]
        up, down = self.param("up", init, (4, 32, 48)), self.param("down", init, (4, 48, 32))
        rows = jax.lax.ragged_dot(nn.silu(jax.lax.ragged_dot(rows, up, sizes)), down, sizes)
        chosen = jnp.take_along_axis(gates, expert[:, None], 1)
        return x + (jnp.zeros_like(flat).at[order].set(rows) * chosen).reshape(x.shape)


def test_a_mixture_of_experts_and_an_expert_that_no_row_reaches():
    model, x = Mixture(), normal(3, 2, 8, 32)
    variables = model.init(jax.random.key(4), x)
    w = variables["params"]["router"]["kernel"]
    # No row reaches the last expert.
    bias = jnp.concatenate([x.reshape(-1, 32).mean(0)[:, None]] * 4, 1) * jnp.array([0, 0, 0, -1e3])
    variables["params"]["router"]["kernel"] = w + bias
    for recipe in (RECIPE, ttq.preset("best", bits=4, group_size=16, moments="prompt", head=None)):
        packed = check(model.apply, variables, x, recipe=recipe)
        rows = packed["params"]["up"].rows[0]
        assert rows.shape == (4,)
        assert float(rows.sum()) == 16
        assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(packed))


class Decoder(nn.Module):
    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 32, name="embed")(tokens)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        h, make = nn.LayerNorm(name="norm")(x), nn.MultiHeadDotProductAttention
        x = x + make(num_heads=2, decode=self.decode, name="attention")(h, mask=mask)
        x = x + nn.Dense(32, name="mlp")(nn.silu(x))
        return nn.Dense(50, name="head")(x)


def test_a_linen_decoder_with_flax_s_own_cache():
    reader, decoder = Decoder(), Decoder(decode=True)
    prompt = jax.random.randint(jax.random.key(5), (2, 6), 0, 50)
    variables = reader.init(jax.random.key(6), prompt)
    sized = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((2, 12), jnp.int32))
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sized["cache"])

    def fn(variables, token, cache):
        return decoder.apply({**variables, "cache": cache}, token, mutable="cache")

    def answer(variables, step):
        def feed(carry, token):
            cache, _ = carry
            logits, new = step(token[:, None], cache)
            chosen = jnp.argmax(logits[:, -1], -1).astype(prompt.dtype)
            return (new["cache"], chosen), chosen

        start = (empty, prompt[:, 0])
        (cache, token), _ = jax.lax.scan(feed, start, prompt.T)
        again = lambda carry, _: feed(carry, carry[1])  # noqa: E731
        return jax.lax.scan(again, (cache, token), None, length=5)[1]

    @jax.jit
    def quantized(variables):
        packed = ttq.read(reader.apply, RECIPE)(variables, prompt)[1]
        return packed, answer(variables, lambda *args: ttq.run(fn)(packed, *args))

    packed, tokens = quantized(variables)
    rounded = dense_tree(variables, packed)
    faked = jax.jit(lambda v: answer(v, lambda *args: fn(v, *args)))(rounded)
    np.testing.assert_array_equal(tokens, faked)
    assert packed["params"]["head"]["kernel"].shape == (32, 50)
    assert not is_packed(packed["params"]["head"]["kernel"])


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(50, 32, rngs=rngs), nnx.Linear(32, 50, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 32, decode=True, rngs=rngs)
        self.mlp = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.head(x + self.mlp(nnx.silu(x)))


def test_an_nnx_decoder_whose_prompt_is_fed_token_by_token():
    model = Stateful(nnx.Rngs(0))
    model.attention.init_cache((2, 12, 32))
    fn, params, rest = ttq.functional(model)
    prompt = jax.random.randint(jax.random.key(7), (2, 6), 0, 50)

    def feed(step, rest, tokens):
        one = lambda rest, token: step(rest, token[:, None])[::-1]  # noqa: E731
        return jax.lax.scan(one, rest, tokens)

    def decode(step, rest, logits):
        def one(carry, _):
            rest, token = carry
            logits, rest = step(rest, token[:, None])
            token = jnp.argmax(logits[:, -1], -1)
            return (rest, token), token

        first = jnp.argmax(logits[-1][:, -1], -1)
        return jax.lax.scan(one, (rest, first), None, length=5)[1]

    @jax.jit
    def quantized(params, rest):
        whole = lambda p, rest: feed(lambda *a: fn(p, *a), rest, prompt.T)  # noqa: E731
        (rest, logits), observed = ttq.observe(whole, RECIPE)(params, rest)
        packed = ttq.quantize(params, observed, RECIPE)
        return packed, observed, decode(lambda *a: ttq.run(fn)(packed, *a), rest, logits)

    packed, observed, tokens = quantized(params, rest)
    assert {float(site.moments.count) for site in observed.sites} == {12.0}

    @jax.jit
    def plain(params, rounded, rest):
        rest, logits = feed(lambda *a: fn(params, *a), rest, prompt.T)
        return decode(lambda *a: fn(rounded, *a), rest, logits)

    np.testing.assert_array_equal(tokens, plain(params, dense_tree(params, packed), rest))


W = {"layers": normal(8, 3, 32, 32) / 6, "out": normal(9, 32, 24) / 6}
XS = normal(10, 4, 8, 32) * jnp.exp(normal(11, 32))


def layered(w, x):
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jax.lax.scan(step, x, w["layers"])[0] @ w["out"]


RECIPES = {
    name: ttq.preset(name, bits=3, group_size=16, moments="prompt", head=None)
    for name in ("ttq", "fast", "best")
} | {
    "rtn": ttq.preset("rtn", bits=3, group_size=16),
    "hqq": ttq.preset("hqq", bits=3, group_size=16),
    "low rank": ttq.Recipe(
        grid=ttq.Grid(bits=3, group_size=16),
        low_rank=ttq.LowRankRule(rank=2, error_rank=2, mean=True),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_one_pass_is_observing_and_quantizing(name):
    """In one pass a layer is quantized inside its scan; every bit is the same."""
    recipe = RECIPES[name]

    @jax.jit
    def program(w, x):
        out, packed = ttq.read(layered, recipe)(w, x)
        seen, observed = ttq.observe(layered, recipe)(w, x)
        return packed, ttq.quantize(w, observed, recipe), out, seen, ttq.run(layered)(packed, x)

    packed, again, out, seen, y = program(W, XS[0])
    same_bits(packed, again)
    np.testing.assert_array_equal(out, seen)
    np.testing.assert_allclose(out, layered(W, XS[0]), atol=1e-5)
    np.testing.assert_allclose(y, layered(dense_tree(W, packed), XS[0]), atol=3e-4)


@pytest.mark.parametrize("cast_before", [False, True])
def test_a_cast_on_the_way_does_not_round_twice(cast_before):
    """What is packed is the parameter as it is stored, inside a scan too."""

    def fn(w, x):
        layers = w["layers"].astype(jnp.bfloat16) if cast_before else w["layers"]
        step = lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None)  # noqa: E731
        return jax.lax.scan(step, x.astype(jnp.bfloat16), layers)[0]

    recipe = RECIPES["rtn"]
    packed = ttq.read(fn, recipe)(W, XS[0])[1]
    same_bits(packed["layers"], ttq.read(layered, recipe)(W, XS[0])[1]["layers"])


def test_moments_of_several_calls_add():
    seen = jax.jit(lambda w, x: ttq.observe(layered, RECIPES["best"])(w, x)[1])
    whole = seen(W, XS[:2])
    parts = seen(W, XS[:1]) + seen(W, XS[1:2])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    nothing = whole.scaled(0.0)
    same_bits(whole + nothing, whole)


def test_moments_of_a_corpus_and_a_corpus_as_a_prior():
    corpus = ttq.observe(layered, RECIPE)(W, XS[:3])[1]
    awq = ttq.preset("awq", bits=4, group_size=16)
    packed = ttq.quantize(W, ttq.observe(layered, awq)(W, XS[:3])[1], awq)
    assert is_packed(packed["layers"])
    only = ttq.Source(prior="corpus", prior_tokens=float("inf"))
    recipe = ttq.preset("ttq", bits=4, group_size=16, moments=only)
    read = ttq.read(layered, recipe, prior=corpus)(W, XS[3])[1]
    of_corpus = ttq.preset("ttq", bits=4, group_size=16, moments="corpus")
    same_bits(read, ttq.quantize(W, corpus, of_corpus))


def test_a_tree_for_each_prompt():
    trees = jax.jit(jax.vmap(lambda x: ttq.read(layered, RECIPE)(W, x)[1]))(XS)
    alone = jax.jit(lambda x: ttq.read(layered, RECIPE)(W, x)[1])(XS[2])
    same_bits(jax.tree.map(lambda a: a[2], trees), alone)
    y = jax.jit(jax.vmap(ttq.run(layered)))(trees, XS)
    np.testing.assert_allclose(y[2], ttq.run(layered)(alone, XS[2]), atol=1e-5)


def test_a_second_prompt_compiles_nothing():
    program = jax.jit(lambda w, x: ttq.read(layered, RECIPE)(w, x))
    for x in XS[:2]:
        program(W, x)
    assert program._cache_size() == 1


def test_bits_and_bytes_of_the_result():
    packed = ttq.read(layered, ttq.preset("ttq", bits=4, group_size=16))(W, XS[0])[1]
    # 4 bits, a scale and a zero point of 16 bits each for 16 weights, D of 16 bits for a row.
    d, layer, out = 16, 32 * 32, 32 * 24
    wanted = 4 + 2 * 16 / 16 + (3 * 32 * d + 32 * d) / (3 * layer + out)
    assert effective_bits(packed) == pytest.approx(wanted)
    assert stored_bytes(packed) == pytest.approx(wanted * (3 * layer + out) / 8 + 4 * (3 + 1))


def test_a_store_gives_back_every_bit(tmp_path):
    packed = ttq.read(layered, RECIPES["fast"])(W | {"norm": jnp.ones(32)}, XS[0])[1]
    ttq.save_packed(tmp_path / "packed", packed)
    like = jax.eval_shape(lambda: W | {"norm": jnp.ones(32)})
    loaded = ttq.load_packed(tmp_path / "packed", like)
    same_bits(loaded, packed)
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    np.testing.assert_array_equal(ttq.run(layered)(loaded, XS[0]), ttq.run(layered)(packed, XS[0]))


def test_a_store_of_other_parameters(tmp_path):
    packed = ttq.read(layered, RECIPE)(W, XS[0])[1]
    ttq.save_packed(tmp_path / "packed", packed)
    with pytest.raises(ttq.Error, match="made for other parameters: norm differ in path"):
        ttq.load_packed(tmp_path / "packed", W | {"norm": jnp.ones(32)})
    with pytest.raises(ttq.Error, match="expected packed parameters, got none"):
        ttq.save_packed(tmp_path / "other", W)
