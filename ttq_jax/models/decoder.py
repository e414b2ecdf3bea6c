"""One decoder for every family.

One idea keeps quantizers out of the model: a block never multiplies a weight itself. At four
*sites* (the inputs of q,k,v; of o; of gate,up; of down) it passes its activations and the site's
weights to `project`. Decoding passes `plain` for it; prefill, a function that also observes and
quantizes; calibration, one that also observes. What `project` keeps, the scan stacks over the
layers. In a mixture of experts the activations of the last two sites come sorted by expert, as
`Routed`, and kernels have one more leading axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.config import ModelConfig
from ttq_jax.experts import Routed, gather_tokens, routed_linear, sort_by_expert
from ttq_jax.host import on_host, slab_of
from ttq_jax.linear import columns, linear, scores
from ttq_jax.models.cache import activation_dtype, next_positions, register
from ttq_jax.models.chunks import Chunks, over_chunks
from ttq_jax.models.layer_constants import growths, layer_constants
from ttq_jax.models.layers import ACTIVATIONS, make_norm, scaled, softcap
from ttq_jax.models.reading import Reading
from ttq_jax.partition import lookup
from ttq_jax.types import EXPERT_SITES, SITES, Cache, Params, QuantizedLinear, Stacked, at_layer

# (site, x[B, T, d_in], {name: {"kernel", "bias"?}}) -> ({name: y[B, T, d_out]}, whatever to keep);
# of `Routed` rows [N, R, d_in], y is [N, R, d_out]
Project = Callable[[str, Array | Routed, dict[str, Params]], tuple[dict[str, Array], Any]]


def plain(
    site: str, x: Array | Routed, weights: dict[str, Params]
) -> tuple[dict[str, Array], None]:
    """The simplest `Project`: multiply, keep nothing."""
    del site
    if isinstance(x, Routed):
        return routed_linear(x, weights), None
    return {name: linear(x, w["kernel"], w.get("bias")) for name, w in weights.items()}, None


def _linear_params(
    module: nn.Module, name: str, d_in: int, d_out: int, bias: bool, experts: int = 0
) -> Params:
    """One projection's parameters, or of all experts, created at init and else taken as they are.

    Flax compares a parameter's shape with its initializer's; a packed kernel has none, hence the
    second path.
    """
    if not module.is_initializing():
        return module.get_variable("params", name)

    def init(key: Array) -> Params:
        shape = (experts, d_in, d_out) if experts else (d_in, d_out)
        lecun = nn.initializers.lecun_normal(batch_axis=range(len(shape) - 2))
        kernel = lecun(key, shape, jnp.float32)
        return {"kernel": kernel} | ({"bias": jnp.zeros(d_out, jnp.float32)} if bias else {})

    return module.param(name, init)


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each in a residual branch.

    Attributes:
      config: the model's.
    """

    config: ModelConfig

    def sublayer(self, name: str, x: Array, body: Callable[[Array], Array]) -> Array:
        """Adds `body` to the residual stream, with norms where this family has them."""
        c = self.config
        before = c.norm_placement in {"pre", "sandwich"}
        y = body(make_norm(c, f"{name}_norm")(x) if before else x)
        if c.norm_placement in {"branch", "sandwich"}:
            y = make_norm(c, f"{name}_post_norm")(y)
        y = x + scaled(y, c.residual_scale)
        return make_norm(c, f"{name}_norm")(y) if c.norm_placement == "post" else y

    def weights(self, site: str) -> dict[str, Params]:
        """The parameters of the projections that read this site's activations."""
        c = self.config
        heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        shapes = {
            "q": (c.d_model, heads, c.qkv_bias),
            "k": (c.d_model, kv, c.qkv_bias),
            "v": (c.d_model, kv, c.qkv_bias),
            "o": (heads, c.d_model, c.o_bias),
            "gate": (c.d_model, c.d_ff, c.mlp_bias),
            "up": (c.d_model, c.d_ff, c.mlp_bias),
            "down": (c.d_ff, c.d_model, c.mlp_bias),
        }
        names = [n for n in SITES[site] if n != "gate" or c.gated]
        experts = c.n_experts if site in EXPERT_SITES else 0
        return {n: _linear_params(self, n, *shapes[n], experts) for n in names}

    def route(
        self, x: Float[Array, "M D"], valid: Bool[Array, " M"]
    ) -> tuple[Routed, Callable[[Array], Array]]:
        """The tokens sorted by the experts that the router chooses, and what undoes the sorting."""
        c = self.config

        def init(key: Array) -> Params:
            shape = (c.n_experts, c.d_model)
            return {"embedding": nn.initializers.normal(0.02)(key, shape, jnp.float32)}

        table = self.param("router", init)["embedding"]
        scores = jnp.einsum("md,ed->me", x, table, preferred_element_type=jnp.float32)
        weight, chosen = jax.lax.top_k(jax.nn.softmax(scores), c.experts_per_token)
        if c.norm_topk:
            weight = weight / jnp.sum(weight, axis=1, keepdims=True)
        routed, place = sort_by_expert(x, chosen.astype(jnp.int32), valid, c.n_experts)
        return routed, lambda rows: gather_tokens(rows, place, weight).astype(x.dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        attention: Callable[[Array, Array, Array], tuple[Array, Any]],
        project: Project,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Any]]:
        """Runs the layer.

        Args:
          x: the residual stream.
          valid: which tokens are real; the others reach no expert.
          attention: rotates, caches and attends: (q, k, v)[B, T, heads, H] -> mixed values and
            the updated cache.
          project: multiplies the weights of a site, see the module's docstring.

        Returns:
          The residual stream, the cache, and per site what `project` kept.
        """
        c = self.config
        kept: dict[str, Any] = {}
        cache: Any = None

        def visit(site: str, h: Array | Routed) -> dict[str, Array]:
            ys, kept[site] = project(site, h, self.weights(site))
            return ys

        def attend_body(h: Array) -> Array:
            nonlocal cache
            ys = visit("attn_in", h)

            def normed(over: str) -> None:
                if c.qk_norm and c.qk_norm_over == over:
                    for name in ("q", "k"):
                        ys[name] = make_norm(c, f"{name}_norm")(ys[name])

            normed("all")
            ys = {name: y.reshape(*y.shape[:2], -1, c.head_dim) for name, y in ys.items()}
            normed("head")
            q, k, v = ys["q"], ys["k"], ys["v"]
            mixed, cache = attention(q, k, v)
            return visit("attn_out", mixed.reshape(*h.shape[:2], -1))["o"]

        def units(h: Array | Routed) -> Array:
            ys = visit("mlp_in", h)
            act = ACTIVATIONS[c.activation]
            return act(ys["gate"]) * ys["up"] if c.gated else act(ys["up"])

        def mlp_body(h: Array) -> Array:
            if not c.n_experts:
                return visit("mlp_out", units(h))["down"]
            routed, gather = self.route(h.reshape(-1, c.d_model), valid.reshape(-1))
            hidden = dataclasses.replace(routed, rows=units(routed))
            return gather(visit("mlp_out", hidden)["down"]).reshape(h.shape)

        x = self.sublayer("attn", x, attend_body)
        x = self.sublayer("mlp", x, mlp_body)
        return x, cache, kept


def embed(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Token embeddings (and learned positions, where the family has them)."""
    table = params["embed"]["embedding"]
    if isinstance(table, QuantizedLinear):
        rows = lookup(columns, table, tokens).astype(activation_dtype(params))
    else:
        rows = lookup(lambda table, at: table[at], table, tokens)
    x = scaled(rows, config.embed_scale)
    if "project_in" in params:
        x = linear(x, params["project_in"]["kernel"])
    if "positions" in params:
        x = x + params["positions"]["embedding"][positions]
    return x


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Next-token logits of final hidden states.

    Args:
      config: the model's.
      params: its tree; "head" if untied, else the embedding serves.
      hidden: what `forward` returned.

    Returns:
      float32 logits.
    """
    if "project_out" in params:
        hidden = linear(hidden, params["project_out"]["kernel"])
    tied = config.tie_embeddings
    table = params["embed"]["embedding"] if tied else params["head"]["kernel"]
    if isinstance(table, QuantizedLinear):
        out = scores(hidden, table)
    else:
        how = "...d,vd->...v" if tied else "...d,dv->...v"
        out = jnp.einsum(how, hidden, table, preferred_element_type=jnp.float32)
    return softcap(scaled(out, 1 / config.logit_divisor), config.logit_softcap)


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: Cache,
    *,
    slots: int | None = None,
    project: Callable[..., tuple[dict[str, Array], Any]] = plain,
    per_layer: Any = None,
    chunks: Chunks | None = None,
) -> tuple[Float[Array, "B T D"], Cache, dict[str, Any]]:
    """Reads tokens that follow those in the cache.

    Args:
      config: the model's.
      params: its tree, dense, packed or mixed; its layers stacked, or separate as from `unstack`
        (then nothing is kept and `per_layer` is not read).
      tokens: to read.
      valid: which of them are real; padding changes nothing outside its own outputs.
      cache: of the tokens read before, with at least T free slots.
      slots: attend only to the cache's first `slots` slots, which must include the new ones;
        None for all.
      project: see the module's docstring; with `per_layer` it gets one more argument.
      per_layer: a pytree stacked over the layers, sliced for `project`; None for none.
      chunks: read the tokens in parts; the cache must be empty, the layers stacked, and `project`
        is not called. None reads them at once.

    Returns:
      Final hidden states (after the last norm), the cache, and per site what `project` kept,
      stacked over the layers.
    """
    start, positions = cache.used, next_positions(cache, valid)
    cache = register(cache, positions, valid)
    x = embed(config, params, tokens, positions)
    grown = growths(config, cache)
    reading = Reading(config, cache, positions, valid, start, slots or cache.valid.shape[1], grown)
    block = Block(config)

    def layer_step(carry: Any, layer: Any) -> tuple[Any, dict[str, Any]]:
        x, *stacks = carry
        weights, constants, extra = layer
        weights = at_layer(params["layers"], constants["layer"]) if weights is None else weights

        def visit(site: str, h: Any, w: dict[str, Params]) -> tuple[dict[str, Array], Any]:
            return project(site, h, w) if per_layer is None else project(site, h, w, extra)

        if chunks is not None:
            return _in_chunks(block, reading, chunks, x, stacks, weights, constants, extra)
        attention = reading.attention(constants, tuple(stacks))
        out: Any = block.apply({"params": weights}, x, valid, attention, visit)
        x, stacks, kept = out
        return (x, *stacks), kept

    carry = (x, cache.k, cache.v)
    constants = layer_constants(config)
    kept: dict[str, Any] = {}
    if isinstance(params["layers"], tuple):
        for i, weights in enumerate(params["layers"]):
            at = jax.tree.map(lambda c, i=i: c[i], constants)
            carry, _ = layer_step(carry, (weights, at, None))
    else:
        carry, kept = jax.lax.scan(layer_step, carry, (None, constants, per_layer))
    x, k, v = carry
    if config.final_norm:
        x = jnp.asarray(make_norm(config).apply({"params": params["final_norm"]}, x))
    return x, dataclasses.replace(cache, k=k, v=v), kept


def _in_chunks(
    block: Block, reading: Reading, chunks: Chunks, x: Array, stacks: Any, weights: Params,
    constants: dict[str, Array], extra: Any,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A layer over a prompt in parts, then what is made of their sums."""
    # Those in the host's memory are fetched once, not for each part.
    near = {name: leaf | _fetched(leaf) for name, leaf in weights.items()}

    def run(x: Array, first: Array, stacks: Any) -> tuple[Array, Any, dict[str, Any]]:
        part = reading.part(first, x.shape[1])
        attention = part.attention(constants, stacks, chunks.size)
        project = chunks.project(part.valid)
        out: Any = block.apply({"params": near}, x, part.valid, attention, project)
        return out

    x, stacks, sums = over_chunks(run, x, tuple(stacks), chunks.size)
    kept = {
        site: chunks.finish(site, seen, {n: weights[n] for n in SITES[site] if n in weights}, extra)
        for site, seen in sums.items()
    }
    return (x, *stacks), kept


def _fetched(leaf: Params) -> Params:
    """The kernel of a layer's projection, if it is in the host's memory, in the device's."""
    kernel = leaf.get("kernel")
    if not isinstance(kernel, Stacked) or not on_host(kernel.kernels):
        return {}
    return {"kernel": Stacked(slab_of(kernel.kernels, kernel.layer), jnp.zeros((), jnp.int32))}


def unstack(params: Params) -> Params:
    """The same tree with separate layers: a tuple of single-layer trees.

    `forward` then unrolls the layers. A scan copies each layer out of the stack before it is
    multiplied, which is slow where memory bandwidth is the limit, as when a CPU decodes.

    Args:
      params: a tree with stacked layers.

    Returns:
      The tree; everything but the layers is shared.
    """
    n_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(n_layers)]
    return {**params, "layers": tuple(layers)}


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random parameters, in the tree structure that every checkpoint is loaded into.

    `jax.eval_shape(partial(init_params, config), key)` gives the shapes that a loader must fill.

    Args:
      config: the model's.
      key: a PRNG key.

    Returns:
      {"embed", "layers", …}; "layers" is stacked over L; kernels are [d_in, d_out]; float32.
    """
    names = ("embed", "positions", "in", "out", "head", "layers")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    normal = nn.initializers.normal(0.02, jnp.float32)
    x, valid = jnp.zeros((1, 1, config.d_model), jnp.float32), jnp.ones((1, 1), bool)
    one_layer = Block(config).init

    def init_layer(layer_key: Array) -> Params:
        attention = lambda q, k, v: (q, None)  # noqa: E731
        return one_layer(layer_key, x, valid, attention, plain)["params"]

    params: Params = {
        "embed": {"embedding": normal(keys["embed"], (config.vocab_size, config.embed_dim))},
        "layers": jax.vmap(init_layer)(jax.random.split(keys["layers"], config.n_layers)),
    }
    if config.rope is None:
        shape = (config.max_positions, config.d_model)
        params["positions"] = {"embedding": normal(keys["positions"], shape)}
    if config.embed_dim != config.d_model:
        shape = (config.embed_dim, config.d_model)
        params["project_in"] = {"kernel": normal(keys["in"], shape)}
        params["project_out"] = {"kernel": normal(keys["out"], shape[::-1])}
    if config.final_norm:
        params["final_norm"] = make_norm(config).init(key, x)["params"]
    if not config.tie_embeddings:
        params["head"] = {"kernel": normal(keys["head"], (config.embed_dim, config.vocab_size))}
    return params
