"""Whether a model fits a chip, and how fast it could be at best, before either is there.

Memory is the compiler's word where there is a compiler for the chip, else a sum of sizes, which a
plan says. Times are lower bounds: what must be read over the speed at which it can be, and what
must be multiplied over the chip's peak. Nothing here was measured.
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from ttq_jax.checkpoint.placing import Memory, check_memory
from ttq_jax.chips import share
from ttq_jax.chips.absent import CHIPS, Chip, ChipError
from ttq_jax.chips.programs import compile_generate
from ttq_jax.chips.released import params_shapes
from ttq_jax.chips.slices import collectives, compile_on_slice
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.mesh import in_shape
from ttq_jax.models.cache import check_dtype, empty_cache
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.prior import for_unreached
from ttq_jax.partition import own_rows
from ttq_jax.prefill import check_chunk, decoded_shapes
from ttq_jax.prompts import bucket
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import (
    EXPERT_SITES,
    SITES,
    MixedLinear,
    Offline,
    Params,
    QuantizedLinear,
    kernels,
    stored_bytes,
)

_GIB = 2**30
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a100-40": ("a100", {"memory": 40 * _GIB, "bandwidth": 1555e9}),
}
"""Smaller models of a chip: the same code, another memory."""

# A sum of sizes leaves this much of the memory to what it does not count.
_UNCOUNTED = 0.05
# TPUs' vendor tells no speed of the link to the host; a third-generation PCIe one is assumed.
_LINK = 16e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a program takes of a chip; on a mesh, of each of its devices.

    Attributes:
      by: "compiler", or "arithmetic": then `temporaries` are an estimate.
      why: why there was no compiler; "" if there was one.
      device: bytes in the device's memory by kind: "dense" blocks, "packed" blocks, "tables" (and
        norms and biases), "cache", "temporaries"; the last is what the compiler adds to the rest.
      total: their sum; of a program that the compiler refused, what it says would be needed.
      host: bytes in the host's memory; on a mesh of one device, and a host has them of each of its.
      memory: the device's, bytes.
      fits: whether the total does.
      bytes_per_token: weights and cache that each decoded token reads of a device; of experts the
        mean over the devices.
      token_seconds: the same at the memory's speed; of dense blocks on the host at the link's.
      exchange_seconds: what the devices of a mesh exchange for a token, at their links' speed; not
        in `token_seconds`, and an estimate: of bytes alone, see `share.exchange_seconds`. None
        without a mesh, and for a mixture of which no compiler tells.
      first_token_seconds: lower bounds by cause: "read" (every weight once, or once for each part
        of the prompt and once more to be quantized), "multiply".
      mesh: devices by axis; None for one device.
      per_host: "hosts", how many; "devices", how many each has; "device_bytes", the total of these;
        "reading", bytes of its own memory for the largest array while the model is read.
      collectives: what the devices exchange, see `slices.collectives`; by arithmetic only of a
        decoded token's layer, and nothing of a mixture.
      collectives_by: "compiler" or "arithmetic".
    """

    by: str
    why: str
    device: dict[str, int]
    total: int
    host: int
    memory: int
    fits: bool
    bytes_per_token: int
    token_seconds: float
    exchange_seconds: float | None
    first_token_seconds: dict[str, float]
    mesh: dict[str, int] | None
    per_host: dict[str, int]
    collectives: dict[str, list[str]]
    collectives_by: str

    def describe(self) -> dict[str, Any]:
        """JSON data."""
        return dataclasses.asdict(self)


def chip_of(name: str) -> tuple[str, Chip]:
    """What compiles for a chip of `CHIPS` or `VARIANTS`, and its figures.

    Args:
      name: the chip.

    Returns:
      A key of `CHIPS`, and the chip.
    """
    base, changes = VARIANTS.get(name, (name, {}))
    return base, dataclasses.replace(CHIPS[base], **changes)


def link_speed(chip: Chip, link: float | None = None) -> float:
    """Bytes per second at which a chip reads the host's memory: as given, its own, or assumed."""
    return link or chip.link or _LINK


def _check(recipe: Recipe | None) -> None:
    """Refuses a recipe whose preparation decides what a program takes.

    Raises:
      ConfigError: it needs a corpus, static factors or a packed tree.
    """
    if recipe is not None and (recipe.source.of != "prompt" or recipe.low_rank.rank):
        raise ConfigError(
            "plan: expected a recipe that reads the prompt alone, without static factors, such as "
            "fast, ttq or best; what others prepare before a prompt is not planned yet"
        )


def plan(
    config: ModelConfig, chip: str, recipe: Recipe | None, *, dtype: str = "bfloat16",
    dense_memory: Memory = "device", batch: int = 1, prompt_tokens: int = 512,
    new_tokens: int = 128, prefill_chunk: int = 0, cache_dtype: str | None = None,
    link: float | None = None, compiled: bool = True, mesh: Mapping[str, int] | None = None,
) -> Plan:  # fmt: skip
    """Plans `generate` for one device, or for the devices of a mesh.

    Args:
      config: the model's.
      chip: a key of `CHIPS` or `VARIANTS`.
      recipe: how weights are quantized for the prompt; None for not.
      dtype: of the dense weights and the activations.
      dense_memory: see `checkpoint.load`.
      batch: prompts read together.
      prompt_tokens: of the longest prompt; padded as `generate` does.
      new_tokens: most tokens of an answer.
      prefill_chunk: see `generate`.
      cache_dtype: see `generate`.
      link: bytes per second between host and device; None for the chip's.
      compiled: ask the compiler, where there is one.
      mesh: see `mesh.make_mesh`; None for one device.

    Returns:
      The plan.

    Raises:
      ConfigError: a size below 1, a recipe that needs more than the prompt, a chunk that
        `prefill.check_chunk` refuses, a cache_dtype that there is not, or a model that the mesh
        cannot share.
      CheckpointError: a dense_memory that there is not.
    """
    if min(batch, prompt_tokens, new_tokens) < 1 or (link is not None and link <= 0):
        raise ConfigError(
            "plan: expected a batch, tokens and a link speed above 0, got "
            f"{batch}, {prompt_tokens} and {new_tokens}, {link}"
        )
    _check(recipe)
    check_memory(dense_memory)
    check_chunk(prefill_chunk, recipe)
    check_dtype(cache_dtype)
    base, it = chip_of(chip)
    read, made = bucket(prompt_tokens), bucket(new_tokens)
    mine = _share(config, recipe, dtype, batch, mesh)
    device = _sizes(config, mine, read + made, cache_dtype or dtype)
    host = device.pop("dense") if dense_memory == "host" else 0
    device = {"dense": 0} | device
    extra = _activations(config, mine, read, prefill_chunk, dtype) + host // config.n_layers
    by, why, total, seen = "arithmetic", "as asked", 0, None
    if compiled:
        try:
            total, seen = _asked(
                config, base, recipe, mesh, dtype=dtype, dense_memory=dense_memory, batch=batch,
                prompt_tokens=read, new_tokens=made, prefill_chunk=prefill_chunk,
                cache_dtype=cache_dtype,
            )  # fmt: skip
            by, why = "compiler", ""
        except ChipError as e:
            why = str(e)
    counted = sum(device.values())
    device["temporaries"] = max(total - counted, 0) if by == "compiler" else extra
    total = total if by == "compiler" else counted + extra
    parts = -(-read // prefill_chunk) if prefill_chunk else 1
    exchanged = share.sums(config, mine.sizes, mine.rows, dtype) if seen is None else seen
    usable = it.memory if by == "compiler" else it.memory * (1 - _UNCOUNTED)
    return Plan(
        by=by, why=why, device=device, total=total, host=host, memory=it.memory,
        fits=total <= usable,
        **_times(config, recipe, mine, device["cache"], it, link_speed(it, link), host, read,
                 parts),
        exchange_seconds=share.exchange_seconds(exchanged, config.n_layers, it.peers),
        mesh=None if mesh is None else dict(mesh), per_host=_per_host(base, mine, total),
        collectives=exchanged, collectives_by="arithmetic" if seen is None else "compiler",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Share:
    """What one device has.

    Attributes:
      sizes: of the mesh, by axis; {} for one device.
      rows: prompts of a batch.
      whole: shapes of the whole dense tree.
      dense: shapes of its part of it.
      decoded: shapes of its part of the tree that is decoded.
    """

    sizes: dict[str, int]
    rows: int
    whole: Params
    dense: Params
    decoded: Params

    @property
    def model(self) -> int:
        """How many devices share a weight."""
        return self.sizes.get("kv", 1) * self.sizes.get("rep", 1)

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.model * self.sizes.get("data", 1)


def _share(
    config: ModelConfig, recipe: Recipe | None, dtype: str, batch: int,
    mesh: Mapping[str, int] | None,
) -> _Share:  # fmt: skip
    """What one device has.

    Raises:
      ConfigError: a model that the mesh cannot share.
    """
    dense = params_shapes(config, dtype)
    sizes = {"data": 1, "model": 1} | dict(mesh or {})
    with contextlib.nullcontext() if mesh is None else in_shape(sizes, config):
        axes = dict(jax.sharding.get_abstract_mesh().shape)
        decoded = _decoded(config, recipe, dense)
        return _Share(
            axes, own_rows(batch), dense, share.own_params(dense, axes),
            share.own_params(decoded, axes),
        )  # fmt: skip


def _per_host(chip: str, mine: _Share, total: int) -> dict[str, int]:
    """What a host has, and what it reads."""
    each = share.devices_per_host(chip, mine.devices)
    return {
        "hosts": -(-mine.devices // each), "devices": each, "device_bytes": each * total,
        "reading": share.largest_read(mine.whole, mine.sizes, each),
    }  # fmt: skip


def _decoded(config: ModelConfig, recipe: Recipe | None, dense: Params) -> Params:
    """Shapes of the tree that is decoded."""
    moments = {}
    if recipe is not None:
        see = partial(for_unreached, config=config, reads=recipe.reads)
        moments = jax.eval_shape(see, dense, {})
    return decoded_shapes(dense, config, recipe, Offline(moments=moments))


def _sizes(config: ModelConfig, mine: _Share, slots: int, dtype: str) -> dict[str, int]:
    """Bytes of a device by kind, but for temporaries."""
    shapes = mine.decoded
    packed = [
        kernel
        for kernel in kernels(shapes["layers"]).values()
        if isinstance(kernel, QuantizedLinear | MixedLinear)
    ]
    heads = share.own_cache(config, mine.sizes)
    cache = jax.eval_shape(partial(empty_cache, heads, mine.rows, slots, dtype))
    return {
        "dense": stored_bytes(kernels(mine.dense["layers"])),
        "packed": stored_bytes(packed),
        "tables": stored_bytes(shapes) - stored_bytes(kernels(shapes["layers"])),
        "cache": stored_bytes(cache),
    }


def _activations(config: ModelConfig, mine: _Share, tokens: int, chunk: int, dtype: str) -> int:
    """Bytes of a layer's activations: the stream, the hidden units; and of the logits."""
    wide = 1 if not config.gated else 2
    together = min(chunk, tokens) if chunk else tokens
    rows = mine.rows * together * (config.experts_per_token or 1)
    item = jax.numpy.dtype(dtype).itemsize
    stream = mine.rows * tokens * config.d_model * item if together < tokens else 0
    units = config.d_model + wide * config.d_ff // mine.model
    return stream + rows * units * item + 4 * mine.rows * config.vocab_size // mine.model


def _asked(
    config: ModelConfig, chip: str, recipe: Recipe | None, mesh: Mapping[str, int] | None, *,
    dense_memory: Memory, **how: Any,
) -> tuple[int, dict[str, list[str]] | None]:  # fmt: skip
    """What the compiler says that a program takes of a device's memory, and what devices exchange.

    Returns:
      Bytes; and see `slices.collectives`, None where there is no program to look into.

    Raises:
      ChipError: there is no compiler, or none for so many devices.
      JaxRuntimeError: the compiler refuses it for another reason than memory.
    """
    try:
        if mesh is None:
            made = compile_generate(config, chip, recipe, dense_memory=dense_memory, **how)
        else:
            made = compile_on_slice(
                config, _slice(chip, mesh), mesh, recipe, dense_memory=dense_memory, **how
            )
    except jax.errors.JaxRuntimeError as e:
        # "… memory required for HLO temporaries (18.62G) exceeds available HBM (15.75G)": of all.
        needed = re.search(r"\(([\d.]+)([GM])\) exceeds available HBM", str(e))
        if needed is None:
            raise
        return round(float(needed[1]) * {"G": 2**30, "M": 2**20}[needed[2]]), None
    said = made.memory_analysis()
    total = (
        said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes
        - said.alias_size_in_bytes + said.generated_code_size_in_bytes
    )  # fmt: skip
    return total, {} if mesh is None else collectives(made.as_text())


def _slice(chip: str, mesh: Mapping[str, int]) -> str:
    """The slice of a mesh, for the TPU compiler.

    Raises:
      ChipError: there is none.
    """
    devices = mesh.get("data", 1) * mesh.get("model", 1)
    found = share.slice_of(chip, devices)
    if found is None:
        known = share.SLICES.get(chip)
        some = f"{', '.join(map(str, known or ()))} {chip}" if known else ", ".join(share.SLICES)
        raise ChipError(f"a compiler is asked for slices of {some}, not for {devices} {chip}")
    return found


def _times(
    config: ModelConfig, recipe: Recipe | None, mine: _Share, cache: int, chip: Chip,
    link: float, host: int, tokens: int, parts: int,
) -> dict[str, Any]:  # fmt: skip
    """The lower bounds of a plan."""
    each = bytes_per_token(mine.decoded, config)
    streamed = 0
    if recipe is None and host:
        # Without a recipe every token fetches the blocks again; of experts those it is sent to.
        streamed = host
        if config.n_experts:
            streamed = round(host * each / stored_bytes(mine.decoded))
    token = (each - streamed + cache) / chip.bandwidth + streamed / link
    # One kernel multiplies and quantizes; what the parts of a prompt have read is read once more.
    again = 1 if parts > 1 and recipe is not None else 0
    blocks = 0 if host else stored_bytes(kernels(mine.dense["layers"]))
    on_device = stored_bytes(mine.dense) - host + (parts + again - 1) * blocks
    read = max(on_device / chip.bandwidth, (1 + again) * host / link)
    streams = 2 if recipe is not None and recipe.prefill == "both" else 1
    flops = streams * 2 * _used_weights(config) / mine.model * mine.rows * tokens
    return {
        "bytes_per_token": each + cache,
        "token_seconds": token,
        "first_token_seconds": {"read": read, "multiply": flops / chip.flops},
    }


def _used_weights(config: ModelConfig) -> float:
    """Weights of the blocks that multiply one token."""
    total = 0.0
    routed = {name for site in EXPERT_SITES for name in SITES[site]}
    for name, kernel in kernels(params_shapes(config)["layers"]).items():
        part = config.experts_per_token / config.n_experts if config.n_experts else 1.0
        total += kernel.size * (part if name in routed else 1.0)
    return total
