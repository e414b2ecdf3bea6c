"""The whole program of a released model, compiled for a chip that need not be there.

Reading the prompt, quantizing and decoding are one executable; its parameters are shapes only, so
no weight is needed. Its memory tells a user whether the model fits the chip, before any download.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ttq_jax.checkpoint.placing import Memory, names_of, streams
from ttq_jax.chips.absent import CHIPS, compile_for
from ttq_jax.chips.released import params_shapes, released_config
from ttq_jax.config import ModelConfig
from ttq_jax.generate import generate_tokens
from ttq_jax.offline.prior import for_unreached
from ttq_jax.quant.head import pack_head
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, Prompts


def compile_generate(
    model: str | ModelConfig, chip: str, recipe: Recipe | None, *, batch: int = 1,
    prompt_tokens: int = 512, new_tokens: int = 128, dtype: str = "bfloat16",
    dense_memory: Memory = "device", prefill_chunk: int = 0,
    cache_dtype: str | None = None, drafts: int = 0,
) -> Any:  # fmt: skip
    """Compiles `generate_tokens` at a model's full size.

    Args:
      model: one of `released.RELEASED`, or the configuration of another model.
      chip: a key of `chips.CHIPS`.
      recipe: how to quantize; without a corpus and without low rank.
      batch: prompts read together.
      prompt_tokens: T.
      new_tokens: most tokens to generate.
      dtype: of the dense weights and the activations.
      dense_memory: see `checkpoint.load`.
      prefill_chunk: see `generate`.
      cache_dtype: see `generate`.
      drafts: tokens that are drafted for each pass of the dense weights; 0 for no speculation.

    Returns:
      The executable.
    """
    config = released_config(model) if isinstance(model, str) else model
    params, moments, head = params_shapes(config, dtype), {}, None
    if recipe is not None and recipe.source.of == "prompt":
        see = partial(for_unreached, config=config, reads=recipe.reads)
        moments = jax.eval_shape(see, params, {})
    if recipe is not None and recipe.head is not None:
        head = jax.eval_shape(partial(pack_head, bits=recipe.head), params)
        # Who verifies drafts reads the tables as they are, beside the drafts' own.
        params, head = (params, head) if drafts else (params | head, None)
    shape = jax.ShapeDtypeStruct
    size = (batch, prompt_tokens)
    prompts = Prompts(shape(size, jnp.int32), shape(size, jnp.bool_))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return compile_for(
        chip, generate_tokens, params, prompts, Offline(moments=moments, head=head), key,
        shape((), jnp.int32), config=config, recipe=recipe, sampling=Sampling(),
        capacity=new_tokens, eos_ids=(0,), drafts=drafts, chunk=prefill_chunk,
        cache_dtype=cache_dtype, on_host=streamed if dense_memory == "host" else None,
    )  # fmt: skip


def streamed(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of `generate_tokens`' arguments is a kernel that the host's memory can hold.

    Args:
      path: as `jax.tree_util` gives it.

    Returns:
      True for the blocks' dense kernels.
    """
    argument, *inside = path
    return argument.idx == 0 and streams(names_of(tuple(inside)))


def memory_of(compiled: Any, chip: str) -> dict[str, float]:
    """The memory of a chip that a program takes, by its compiler.

    Args:
      compiled: for that chip.
      chip: a key of `chips.CHIPS`.

    Returns:
      GiB (2^30 bytes) of arguments (the dense weights), temporaries (packed weights, cache,
      activations), outputs, code; their sum; and what the chip has.
    """
    said = compiled.memory_analysis()
    parts = {
        "arguments": said.argument_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "outputs": said.output_size_in_bytes - said.alias_size_in_bytes,
        "code": said.generated_code_size_in_bytes,
    }
    parts |= {"peak": sum(parts.values()), "chip": CHIPS[chip].memory}
    return {name: round(size / 2**30, 3) for name, size in parts.items()}
