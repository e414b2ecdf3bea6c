"""`ttq plan`: whether a model fits a chip, and how fast it could be at best."""

import argparse
import collections
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint.huggingface import read_config
from ttq_jax.chips.plan import Plan, chip_of, link_speed, plan
from ttq_jax.chips.released import RELEASED, released_config
from ttq_jax.commands.options import recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.evaluation.describe import table, versions
from ttq_jax.evaluation.progress import Progress
from ttq_jax.mesh import parse, undivided

_GIB = 2**30
_KINDS = {
    "dense": "unquantized blocks", "packed": "packed blocks",
    "tables": "embedding, head, norms", "cache": "keys and values", "temporaries": "temporaries",
}  # fmt: skip


def config_of(name: str, ignore_keys: list[str], progress: Progress) -> ModelConfig:
    """The sizes of a model whose weights need not be there.

    Args:
      name: a released model, or a directory with its config.json.
      ignore_keys: see `checkpoint.load`.
      progress: gets the notes of the file.

    Returns:
      Its configuration.

    Raises:
      ConfigError: it is neither, or keys are to be ignored where there is no file.
    """
    if name in RELEASED:
        if ignore_keys:
            raise ConfigError(
                f"--ignore-key: the sizes of {name} are known without its files, so there is no "
                "key to ignore; leave out the option, or give the model's directory"
            )
        return released_config(name)
    directory = Path(name).expanduser()
    if not directory.is_dir():
        raise ConfigError(
            f"plan: expected a directory with config.json, or one of {', '.join(RELEASED)}, got "
            f"{name!r}"
        )
    _, config, notes = read_config(directory, tuple(ignore_keys))
    for note in notes:
        progress.note(note)
    return config


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq plan`.

    Args:
      args: its options.
      progress: where to show it.
    """
    recipe = recipe_of(args)
    config = config_of(args.model, args.ignore_key, progress)
    link = None if args.host_link is None else args.host_link * 1e9
    mesh = None if args.mesh is None else parse(args.mesh)
    if note := undivided(mesh, args.batch_size):
        progress.note(note)
    doing = "adding up" if args.arithmetic else "compiling"
    with progress.stage(f"{doing} {args.model} for {args.chip}"):
        made = plan(
            config, args.chip, recipe, dtype=args.dtype, dense_memory=args.dense_memory,
            batch=args.batch_size, prompt_tokens=args.prompt_tokens,
            new_tokens=args.max_new_tokens, prefill_chunk=args.prefill_chunk,
            cache_dtype=args.cache_dtype, link=link, compiled=not args.arithmetic,
            mesh=mesh,
        )  # fmt: skip
    _, chip = chip_of(args.chip)
    speeds = {
        "memory": chip.bandwidth, "host_link": link_speed(chip, link),
        "host_link_assumed": not (link or chip.link), "flops": chip.flops, "peers": chip.peers,
    }  # fmt: skip
    if args.json:
        print_json({
            "model": args.model, "chip": args.chip, "dtype": args.dtype,
            "recipe": None if recipe is None else recipe.describe(),
            "dense_memory": args.dense_memory, "batch_size": args.batch_size,
            "prompt_tokens": args.prompt_tokens, "max_new_tokens": args.max_new_tokens,
            "prefill_chunk": args.prefill_chunk, "cache_dtype": args.cache_dtype,
            "speeds": speeds, "versions": versions(), **made.describe(),
        })  # fmt: skip
        return
    print_text(_in_words(args, made, speeds))


def _in_words(args: argparse.Namespace, made: Plan, speeds: dict[str, Any]) -> str:
    """A plan for people."""
    size = lambda n: f"{n / _GIB:.2f} GiB"  # noqa: E731
    several, host = made.mesh is not None, made.per_host
    of = f"each of {host['hosts']} hosts" if host["hosts"] > 1 else "the host"
    rows = [[_KINDS[kind], size(n)] for kind, n in made.device.items() if n]
    if made.by == "arithmetic":
        rows[-1][0] += ", about"
    where = "on each device" if several else "on the device"
    rows += [[where, f"{size(made.total)} of {size(made.memory)}"]]
    if several:
        rows += [[f"on the {host['devices']} devices of {of}", size(host["device_bytes"])]]
    if made.host:
        rows += [[f"in the memory of {of}", size(made.host * host["devices"])]]
    rows += [["largest array that a host reads", size(made.per_host["reading"])]]
    first = made.first_token_seconds
    place = f"each {args.chip} of a mesh of {args.mesh}" if several else args.chip
    verdict = f"{args.model} {'fits' if made.fits else 'does not fit'} {place}"
    how = "by its compiler" if made.by == "compiler" else f"by arithmetic ({made.why})"
    link = "assumed" if speeds["host_link_assumed"] else "at its peak"
    over = f", the host's at {speeds['host_link'] / 1e9:.3g} GB/s ({link})" if made.host else ""
    of = " of a device" if several else ""
    return "\n".join([
        f"{verdict}: {args.prompt_tokens} + {args.max_new_tokens} tokens, batch "
        f"{args.batch_size}, {how}",
        "",
        table(rows, left=1),
        "",
        f"each token reads {size(made.bytes_per_token)}{of}: at least "
        f"{1e3 * made.token_seconds:.2f} ms, {1 / made.token_seconds:.0f} per second",
        f"the first token takes at least {max(first.values()):.2g} s: {first['read']:.2g} s to "
        f"read the weights{over}, {first['multiply']:.2g} s to multiply",
        *(_exchanged(made, speeds["peers"]) if several else []),
    ])  # fmt: skip


def _exchanged(made: Plan, speed: float) -> list[str]:
    """What the devices exchange in each layer, and what that takes at least, in lines."""
    by = "by the compiler" if made.collectives_by == "compiler" else "by arithmetic"
    if made.exchange_seconds is None:
        return ["of what the devices of a mixture of experts exchange only a compiler tells"]
    lines = []
    for what, said in (("token's layer", "a decoded token"), ("prompt's layer", "the prompt")):
        if what in made.collectives:
            counts = collections.Counter(made.collectives[what])
            listed = ", ".join(f"{n} x {one}" for one, n in counts.items()) or "nothing"
            lines.append(f"in each layer of {said} the devices exchange, {by}: {listed}")
    return [
        *lines,
        f"for each token that takes at least {1e3 * made.exchange_seconds:.2g} ms, an estimate: "
        f"its bytes over links of {speed / 1e9:.3g} GB/s one way. How long each exchange takes to "
        "begin is not counted, and may be most of it",
    ]
