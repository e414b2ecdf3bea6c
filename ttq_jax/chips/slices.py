"""The whole program of a released model, compiled for a slice of TPUs that need not be there.

What a user asks before renting one: does it fit, and what do the devices say to each other?
"""

import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from ttq_jax.checkpoint.placing import PINNED, Memory, names_of, streams
from ttq_jax.chips.absent import CHIPS, QUIET, ChipError, chip, compiled_afresh
from ttq_jax.chips.released import params_shapes, released_config
from ttq_jax.config import ModelConfig
from ttq_jax.generate import generate_tokens
from ttq_jax.mesh import make_mesh
from ttq_jax.offline.prior import for_unreached, prior_from_weights
from ttq_jax.partition import DATA, param_specs
from ttq_jax.quant.head import pack_head
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, Prompts

_COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_MADE = re.compile(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")


def compile_on_slice(
    model: str | ModelConfig, slice_: str, sizes: Mapping[str, int], recipe: Recipe | None, *,
    batch: int = 1, prompt_tokens: int = 512, new_tokens: int = 128, dtype: str = "bfloat16",
    dense_memory: Memory = "device", prefill_chunk: int = 0, cache_dtype: str | None = None,
) -> Any:  # fmt: skip
    """Compiles `generate_tokens` at a model's full size on a mesh.

    Args:
      model: one of `released.RELEASED`, or the configuration of another model.
      slice_: a TPU of `chips.CHIPS` and its shape, as the compiler writes it: "v5e:2x4".
      sizes: see `mesh.make_mesh`; they take all its devices.
      recipe: how to quantize; without a corpus and without low rank. None for not.
      batch: prompts read together.
      prompt_tokens: T.
      new_tokens: most tokens to generate.
      dtype: of the dense weights and the activations.
      dense_memory: see `checkpoint.load`.
      prefill_chunk: see `generate`.
      cache_dtype: see `generate`.

    Returns:
      The executable; its memory is a device's.

    Raises:
      ChipError: no TPU's slice, or the compiler is not installed.
      ConfigError: the mesh does not fit the model.
    """
    name, _, _ = slice_.partition(":")
    if name not in CHIPS or CHIPS[name].platform != "tpu":
        raise ChipError(f"slice: expected a TPU and a shape, such as v5e:2x4, got {slice_!r}")
    chip(name)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name=slice_)
    config = released_config(model) if isinstance(model, str) else model
    mesh = make_mesh(sizes, config, found.devices)

    def at(shape: Any, *axes: str | None, kind: str | None = None) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*axes), memory_kind=kind)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def weight(path: tuple[Any, ...], shape: Any, spec: PartitionSpec) -> Any:
        host = dense_memory == "host" and streams(names_of(path))
        return at(shape, *spec, kind=PINNED if host else None)

    with use_abstract_mesh(mesh.abstract_mesh), compiled_afresh():
        params, moments = params_shapes(config, dtype), {}
        if recipe is not None:
            if recipe.source.prior == "weights":
                prior = partial(prior_from_weights, config=config, reads=recipe.reads)
                moments = jax.eval_shape(prior, params)
            see = partial(for_unreached, config=config, reads=recipe.reads)
            moments = jax.eval_shape(see, params, moments)
        if recipe is not None and recipe.head is not None:
            params = params | jax.eval_shape(partial(pack_head, bits=recipe.head), params)
        size, shape = (batch, prompt_tokens), jax.ShapeDtypeStruct
        prompts = Prompts(shape(size, jnp.int32), shape(size, jnp.bool_))
        rest = (Offline(moments=moments), jax.eval_shape(lambda: jax.random.key(0)))
        rows = DATA if batch % mesh.shape[DATA] == 0 else None
        traced = generate_tokens.trace(
            jax.tree.map_with_path(weight, params, param_specs(params)),
            jax.tree.map(lambda s: at(s, rows), prompts),
            *jax.tree.map(at, rest), at(shape((), jnp.int32)),
            config=config, recipe=recipe, sampling=Sampling(), capacity=new_tokens, eos_ids=(0,),
            chunk=prefill_chunk, cache_dtype=cache_dtype,
        )  # fmt: skip
        return traced.lower(lowering_platforms=("tpu",)).compile()


def collectives(text: str) -> dict[str, list[str]]:
    """What the devices exchange, by where it is in the program.

    Args:
      text: a compiled program of `generate_tokens`, as HLO.

    Returns:
      Types and kinds, as in "bf16[1,1,4096] all-reduce": of a layer that reads the prompt
      ("prompt's layer"), of a layer of a decoded token ("token's layer"), of what else there is for
      each token ("token"), and of everything else, which is once ("once").
    """
    bodies = _computations(text)
    entry = next(name for name in bodies if name.startswith("ENTRY "))
    found: dict[str, list[str]] = {}
    found["once"], loops = _within(bodies, entry)
    inner = {body: _within(bodies, body) for body in loops}
    # The decode loop is the last one with a loop inside: the prompt's layers may attend in blocks.
    decode = [body for body, (_, below) in inner.items() if below][-1]
    found["token"], layers = inner.pop(decode)
    found["token's layer"] = [one for body in layers for one in _all(bodies, body)]
    found["prompt's layer"] = [one for body in inner for one in _all(bodies, body)]
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation; the entry's name begins with ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if m := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found.setdefault(f"{m[1] or ''}{m[2]}", [])
        else:
            lines.append(line)
    return found


def _within(bodies: dict[str, list[str]], name: str) -> tuple[list[str], list[str]]:
    """The collectives of a computation, those of its loops left out; and the loops' bodies."""
    made, loops = [], []
    for line in _reached(bodies, name):
        if m := _WHILE.search(line):
            loops.append(m[1])
        elif m := _MADE.search(line):
            made.append(re.sub(r"\{[^}]*\}", "", f"{m[1]} {m[2]}"))
    return made, loops


def _reached(bodies: dict[str, list[str]], name: str) -> Iterator[str]:
    """The lines of a computation and of what it calls, but for its loops."""
    seen, queue = set(), [name]
    while queue:
        name = queue.pop()
        if name in seen or name not in bodies:
            continue
        seen.add(name)
        for line in bodies[name]:
            yield line
            if " while(" not in line:
                queue += _CALLED.findall(line)


def _all(bodies: dict[str, list[str]], name: str) -> list[str]:
    """The collectives of a computation, those of its loops too."""
    made, loops = _within(bodies, name)
    return made + [one for body in loops for one in _all(bodies, body)]
