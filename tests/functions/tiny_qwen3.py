"""Qwen3 as a stranger would write it, in Linen and in NNX, its layers in a scan or one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

D, N, K, H, F, V = 64, 4, 2, 16, 96, 97


def rotate(x, positions):
    inverse = 1e4 ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = positions[None, :, None, None].astype(jnp.float32) * inverse[None, None, None]
    cos, sin, (a, b) = jnp.cos(angle), jnp.sin(angle), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q, k, v, cache, start):
    """q[B, T, N, H], k and v[B, T, K, H] -> mixed[B, T, N, H], cache[2, B, S, K, H]."""
    positions = start + jnp.arange(q.shape[1], dtype=jnp.int32)
    q, k = rotate(q, positions), rotate(k, positions)
    at = (jnp.int32(0), jnp.int32(0), start, jnp.int32(0), jnp.int32(0))
    cache = jax.lax.dynamic_update_slice(cache, jnp.stack([k, v]), at)
    keys, values = (jnp.repeat(one, N // K, axis=2) for one in cache)
    scores = jnp.einsum("btnh,bsnh->bnts", q, keys) * jnp.float32(H**-0.5)
    slots = jnp.arange(cache.shape[2], dtype=jnp.int32)
    scores = jnp.where((slots[None] <= positions[:, None])[None, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), values), cache


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, carry, cache):
        x, start = carry
        dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)  # noqa: E731
        norm = lambda name: nn.RMSNorm(epsilon=1e-5, name=name)  # noqa: E731
        h, heads = norm("attn_norm")(x), (*x.shape[:2], -1, H)
        q = norm("q_norm")(dense(N * H, "q")(h).reshape(heads))
        k = norm("k_norm")(dense(K * H, "k")(h).reshape(heads))
        mixed, cache = attention(q, k, dense(K * H, "v")(h).reshape(heads), cache, start)
        x = x + dense(D, "o")(mixed.reshape(*x.shape[:2], -1))
        h = norm("mlp_norm")(x)
        x = x + dense(D, "down")(nn.silu(dense(F, "gate")(h)) * dense(F, "up")(h))
        return (x, start), cache


class LinenQwen3(nn.Module):
    n_layers: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens, cache, start):
        x = nn.Embed(V, D, name="embed")(tokens)
        if self.scanned:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            layers = nn.scan(nn.remat(LinenBlock), **axes, length=self.n_layers)
            (x, _), cache = layers(name="layers")((x, start), cache)
        else:
            new = []
            for i in range(self.n_layers):
                (x, _), one = LinenBlock(name=f"layers_{i}")((x, start), cache[i])
                new.append(one)
            cache = jnp.stack(new)
        x = nn.RMSNorm(epsilon=1e-5, name="final_norm")(x)
        return nn.Dense(V, use_bias=False, name="head")(x[:, -1]), cache


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        linear = lambda n_in, n_out: nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs)  # noqa: E731
        heads = lambda n: nnx.Einsum("btd,dnh->btnh", (D, n, H), rngs=rngs)  # noqa: E731
        norm = lambda n: nnx.RMSNorm(n, epsilon=1e-5, rngs=rngs)  # noqa: E731
        self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm = norm(D), norm(D), norm(H), norm(H)
        self.q, self.k, self.v = heads(N), heads(K), heads(K)
        self.o = nnx.Einsum("btnh,nhd->btd", (N, H, D), rngs=rngs)
        self.gate, self.up, self.down = linear(D, F), linear(D, F), linear(F, D)

    def __call__(self, x, cache, start):
        h = self.attn_norm(x)
        q, k = self.q_norm(self.q(h)), self.k_norm(self.k(h))
        mixed, cache = attention(q, k, self.v(h), cache, start)
        x = x + self.o(mixed)
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h)), cache


class NnxQwen3(nnx.Module):
    def __init__(self, n_layers, scanned):
        rngs = nnx.Rngs(0)
        self.scanned = scanned
        self.embed = nnx.Embed(V, D, rngs=rngs)
        if scanned:
            make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=n_layers)(make)(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(n_layers)])
        self.final_norm = nnx.RMSNorm(D, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens, cache, start):
        x = self.embed(tokens)
        if self.scanned:

            @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
            def through(x, layer, cache):
                return layer(x, cache, start)

            x, cache = through(x, self.layers, cache)
        else:
            new = []
            for layer, one in zip(self.layers, cache, strict=True):
                x, written = layer(x, one, start)
                new.append(written)
            cache = jnp.stack(new)
        return self.head(self.final_norm(x)[:, -1]), cache


def empty_cache(n_layers, batch, slots):
    return jnp.zeros((n_layers, 2, batch, slots, K, H))
