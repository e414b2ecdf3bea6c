"""Whether a model fits a chip, and how fast it could be at best, before either is there.

Memory is the compiler's word where there is a compiler for the chip, else a sum of sizes, which a
plan says. Times are lower bounds: what must be read over the speed at which it can be, and what
must be multiplied over the chip's peak. Nothing here was measured.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import jax

from ttq_jax.checkpoint.placing import Memory
from ttq_jax.chips.absent import CHIPS, Chip, ChipError
from ttq_jax.chips.programs import compile_generate
from ttq_jax.chips.released import params_shapes
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.models.cache import check_dtype, empty_cache
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.prior import for_unreached
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
    """What a program takes of a chip.

    Attributes:
      by: "compiler", or "arithmetic": then `temporaries` are an estimate.
      why: why there was no compiler; "" if there was one.
      device: bytes in the device's memory by kind: "dense" blocks, "packed" blocks, "tables" (and
        norms and biases), "cache", "temporaries"; the last is what the compiler adds to the rest.
      total: their sum; of a program that the compiler refused, what it says would be needed.
      host: bytes in the host's memory.
      memory: the device's, bytes.
      fits: whether the total does.
      bytes_per_token: weights and cache that each decoded token reads.
      token_seconds: the same at the memory's speed; of dense blocks on the host at the link's.
      first_token_seconds: lower bounds by cause: "read" (every weight once, or once for each part
        of the prompt and once more to be quantized), "multiply".
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
    first_token_seconds: dict[str, float]

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
    new_tokens: int = 128, prefill_chunk: int = 0,
    cache_dtype: str | None = None, link: float | None = None, compiled: bool = True,
) -> Plan:  # fmt: skip
    """Plans `generate` for one device.

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

    Returns:
      The plan.

    Raises:
      ConfigError: a size below 1, a recipe that needs more than the prompt, a chunk that
        `prefill.check_chunk` refuses, or a cache_dtype that there is not.
    """
    if min(batch, prompt_tokens, new_tokens) < 1 or (link is not None and link <= 0):
        raise ConfigError(
            "plan: expected a batch, tokens and a link speed above 0, got "
            f"{batch}, {prompt_tokens} and {new_tokens}, {link}"
        )
    _check(recipe)
    check_chunk(prefill_chunk, recipe)
    check_dtype(cache_dtype)
    base, it = chip_of(chip)
    read, made = bucket(prompt_tokens), bucket(new_tokens)
    dense = params_shapes(config, dtype)
    shapes = _decoded(config, recipe, dense)
    device = _sizes(config, dense, shapes, batch, read + made, cache_dtype or dtype)
    host = device.pop("dense") if dense_memory == "host" else 0
    device = {"dense": 0} | device
    extra = _activations(config, dense, batch, read, prefill_chunk, dtype)
    if host:
        extra += host // config.n_layers
    by, why, total = "arithmetic", "as asked", 0
    if compiled:
        try:
            by, why, total = "compiler", "", _asked(
                config, base, recipe, dtype=dtype, dense_memory=dense_memory, batch=batch,
                prompt_tokens=read, new_tokens=made, prefill_chunk=prefill_chunk,
                cache_dtype=cache_dtype,
            )  # fmt: skip
        except ChipError as e:
            by, why = "arithmetic", str(e)
    counted = sum(device.values())
    device["temporaries"] = max(total - counted, 0) if by == "compiler" else extra
    total = total if by == "compiler" else counted + extra
    parts = -(-read // prefill_chunk) if prefill_chunk else 1
    usable = it.memory if by == "compiler" else it.memory * (1 - _UNCOUNTED)
    return Plan(
        by=by, why=why, device=device, total=total, host=host, memory=it.memory,
        fits=total <= usable,
        **_times(config, recipe, shapes, device["cache"], it, link_speed(it, link), host,
                 stored_bytes(dense), batch * read, parts, device["dense"]),
    )  # fmt: skip


def _decoded(config: ModelConfig, recipe: Recipe | None, dense: Params) -> Params:
    """Shapes of the tree that is decoded."""
    moments = {}
    if recipe is not None:
        see = partial(for_unreached, config=config, reads=recipe.reads)
        moments = jax.eval_shape(see, dense, {})
    return decoded_shapes(dense, config, recipe, Offline(moments=moments))


def _sizes(
    config: ModelConfig, dense: Params, shapes: Params, batch: int, slots: int, dtype: str
) -> dict[str, int]:
    """Bytes by kind, but for temporaries."""
    packed = [
        kernel
        for kernel in kernels(shapes["layers"]).values()
        if isinstance(kernel, QuantizedLinear | MixedLinear)
    ]
    cache = jax.eval_shape(partial(empty_cache, config, batch, slots, dtype))
    return {
        "dense": stored_bytes(kernels(dense["layers"])),
        "packed": stored_bytes(packed),
        "tables": stored_bytes(shapes) - stored_bytes(kernels(shapes["layers"])),
        "cache": stored_bytes(cache),
    }


def _activations(
    config: ModelConfig, dense: Params, batch: int, tokens: int, chunk: int, dtype: str
) -> int:
    """Bytes of a layer's activations: the stream, the hidden units; and of the logits."""
    wide = 1 if not config.gated else 2
    together = min(chunk, tokens) if chunk else tokens
    rows = batch * together * (config.experts_per_token or 1)
    item = jax.numpy.dtype(dtype).itemsize
    stream = batch * tokens * config.d_model * item if together < tokens else 0
    activations = rows * (config.d_model + wide * config.d_ff) * item
    return stream + activations + 4 * batch * config.vocab_size


def _asked(config: ModelConfig, chip: str, recipe: Recipe | None, **how: Any) -> int:
    """Bytes of the device's memory that the compiler says a program takes.

    Raises:
      JaxRuntimeError: the compiler refuses it for another reason than memory.
    """
    try:
        said = compile_generate(config, chip, recipe, **how).memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        # "… memory required for HLO temporaries (18.62G) exceeds available HBM (15.75G)": of all.
        needed = re.search(r"\(([\d.]+)([GM])\) exceeds available HBM", str(e))
        if needed is None:
            raise
        return round(float(needed[1]) * {"G": 2**30, "M": 2**20}[needed[2]])
    return (
        said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes
        - said.alias_size_in_bytes + said.generated_code_size_in_bytes
    )  # fmt: skip


def _times(
    config: ModelConfig, recipe: Recipe | None, shapes: Params, cache: int, chip: Chip,
    link: float, host: int, weights: int, tokens: int, parts: int, blocks: int,
) -> dict[str, Any]:  # fmt: skip
    """The lower bounds of a plan."""
    each = bytes_per_token(shapes, config)
    streamed = 0
    if recipe is None and host:
        # Without a recipe every token fetches the blocks again; of experts those it is sent to.
        streamed = round(host * each / stored_bytes(shapes)) if config.n_experts else host
    token = (each - streamed + cache) / chip.bandwidth + streamed / link
    # One kernel multiplies and quantizes; what the parts of a prompt have read is read once more.
    again = 1 if parts > 1 and recipe is not None else 0
    on_device = weights - host + (parts + again - 1) * blocks
    read = max(on_device / chip.bandwidth, (1 + again) * host / link)
    streams = 2 if recipe is not None and recipe.prefill == "both" else 1
    return {
        "bytes_per_token": each + cache,
        "token_seconds": token,
        "first_token_seconds": {
            "read": read, "multiply": streams * 2 * _used_weights(config) * tokens / chip.flops,
        },
    }  # fmt: skip


def _used_weights(config: ModelConfig) -> float:
    """Weights of the blocks that multiply one token."""
    total = 0.0
    routed = {name for site in EXPERT_SITES for name in SITES[site]}
    for name, kernel in kernels(params_shapes(config)["layers"]).items():
        share = config.experts_per_token / config.n_experts if config.n_experts else 1.0
        total += kernel.size * (share if name in routed else 1.0)
    return total
