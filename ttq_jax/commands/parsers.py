"""The options of every command, and their help.

Nothing here imports jax, so that `--help` and a mistyped option answer at once.
"""

import argparse
import sys
from typing import Any, NoReturn

from ttq_jax._version import __version__
from ttq_jax.commands.asking import add_asking, add_chat, add_conversation, add_system
from ttq_jax.commands.chip_options import add_bench, add_kernels, add_plan
from ttq_jax.commands.loading import (
    add_dense_memory,
    add_ignore_key,
    add_mesh,
    add_model,
    add_processes,
    add_reading,
)
from ttq_jax.commands.output import write
from ttq_jax.commands.scoring import add_text, add_window
from ttq_jax.quant.names import DEFAULT, METHODS, PREFILLS, misnamed

_DESCRIPTION = """\
Test-time quantization of language models: each prompt calibrates the low-bit weights that answer
it (TTQ, arXiv:2603.19296)."""

_EPILOG = """\
Results go to stdout, progress to stderr. Exit codes: 0 done, 1 a mistake in ttq, 2 unusable input
or surroundings, 130 interrupted. --debug shows the Python trace of an error.

Compiled programs are cached, so that a second start is faster: in $JAX_COMPILATION_CACHE_DIR, else
in $XDG_CACHE_HOME/ttq_jax/xla, else in ~/.cache/ttq_jax/xla. --cache-dir changes the place,
--no-compilation-cache turns the cache off."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ttq: error: {message} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own says nothing of a help that could not be written.
        if file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)


def _add_common(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    group = parser.add_argument_group("output and environment")
    if json:
        group.add_argument(
            "--json", action="store_true", help="print JSON on stdout and nothing else"
        )
    group.add_argument("--quiet", action="store_true", help="print no progress on stderr")
    group.add_argument("--debug", action="store_true", help="show the Python trace of an error")
    group.add_argument("--cache-dir", metavar="DIR", help="cache compiled programs here")
    group.add_argument(
        "--no-compilation-cache", action="store_true", help="do not cache compiled programs"
    )


def _recipe_name(text: str) -> str:
    """A preset's name or a file's.

    Raises:
      ArgumentTypeError: neither.
    """
    if wrong := misnamed(text):
        raise argparse.ArgumentTypeError(wrong)
    return text


def _recipe_file(text: str) -> str:
    """A file name that --recipe accepts.

    Raises:
      ArgumentTypeError: it does not end in .toml.
    """
    if not text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .toml, got {text!r}")
    return text


def _add_set(parser: Any) -> None:
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="AXIS.KEY=VALUE",
        help="change any other setting of the recipe, as in scale=searched or "
        "rounding.damping=0.3; may be repeated; overrides the options above",
    )  # fmt: skip


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quantization", "Options that are not given keep the recipe's own value. ttq recipes lists "
        "the recipes; ttq recipes NAME prints one with all its settings."
    )  # fmt: skip
    add = group.add_argument
    add("--recipe", "--method", dest="method", type=_recipe_name, default=DEFAULT,
        metavar="NAME|FILE.toml",
        help=f"{', '.join(METHODS)}, or a file (default: %(default)s)")  # fmt: skip
    add("--bits", type=int, metavar="B", help="bits per code: 2, 3, 4, 5 or 8")
    add("--head", metavar="B",
        help="bits per code of the embedding and the head: 2, 3, 4, 5 or 8; none leaves them "
        "unquantized")  # fmt: skip
    add("--group-size", type=int, metavar="N",
        help="input channels that share a scale: a multiple of 8, or -1 for all")  # fmt: skip
    add("--rank", type=int, metavar="R",
        help="rank of the low-rank part that is kept beside the codes; 0 for none")  # fmt: skip
    add("--symmetric", action=argparse.BooleanOptionalAction,
        help="quantize without zero points, or with them")  # fmt: skip
    add("--clip", action="store_true",
        help="search each group's range before rounding to nearest")  # fmt: skip
    add("--alpha", type=float, help="power-law scale: exponent of the channel scale")
    add("--lam", type=float, metavar="LAMBDA",
        help="power-law scale: constant added to the relative moment")  # fmt: skip
    add("--p", type=float, help="power-law scale: exponent of the activation moment")
    add("--prefill", choices=PREFILLS,
        help="weights that read the prompt: full takes the unquantized ones; quantized takes each "
        "layer's own quantized ones, as in the paper; both has a stream of either")  # fmt: skip
    add("--select", metavar="REGEX",
        help="projections to quantize, by path, as in layers/(q|down)")  # fmt: skip
    add("--zero-point", choices=("integer", "float"), help="how zero points are stored")
    add("--scales", choices=("float", "coded", "coded4"),
        help="scales as numbers, in eight bits, or in four beside the zero point's")  # fmt: skip
    add("--store-dtype", choices=("bfloat16", "float16", "float32"),
        help="dtype of stored scales, zero points and low-rank factors")  # fmt: skip
    _add_set(group)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "calibration", "For recipes that are calibrated on a corpus, such as awq and gptq."
    )
    group.add_argument(
        "--calibration", metavar="FILE", help="the calibration corpus: a text file or hf:NAME"
    )
    group.add_argument(
        "--calibration-tokens", type=int, default=8192, metavar="N",
        help="calibrate on its first N tokens (default: %(default)s)",
    )  # fmt: skip


def _add_prepared(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("saved files")
    group.add_argument(
        "--prepared", metavar="DIR",
        help="use what ttq prepare saved here for the same model and recipe",
    )  # fmt: skip
    group.add_argument(
        "--save-recipe", type=_recipe_file, metavar="FILE.toml",
        help="write the recipe with all options applied",
    )  # fmt: skip


def _add_quantizing(parser: argparse.ArgumentParser) -> None:
    _add_prepared(parser)
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue prompts, with weights made for each")
    add_model(parser)
    add_mesh(parser)
    add_processes(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt")
    prompts.add_argument(
        "--prompts-file", metavar="F", help="UTF-8 text file, one prompt per line; - reads stdin"
    )
    add = parser.add_argument
    add_chat(parser)
    add_asking(parser, 64)
    add_reading(parser)
    add("--batch-size", type=int, default=1, metavar="B",
        help="read B prompts together; they share one set of quantized weights unless "
        "--per-prompt is given (default: %(default)s)")  # fmt: skip
    add("--per-prompt", action="store_true",
        help="quantize for each prompt of a batch separately")  # fmt: skip
    add("--timings", action="store_true",
        help="after each answer, run its program ten times more and tell how long it takes"
        )  # fmt: skip
    add_conversation(parser)
    _add_quantizing(parser)


def _chat_parser(commands: Any) -> None:
    about = "talk with an instruct model; each answer has weights made for it"
    parser = commands.add_parser(
        "chat", help=about, description=f"{about}. The vocabulary's tables stay in memory as they "
        "are, beside packed ones: /recipe may ask for another width."
    )  # fmt: skip
    add_model(parser)
    add_mesh(parser)
    add_system(parser)
    add_asking(parser, 512)
    add_reading(parser)
    add_conversation(parser)
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser, json=False)


def _perplexity_parser(commands: Any) -> None:
    parser = commands.add_parser("perplexity", help="score a text, window by window")
    add_model(parser)
    add_mesh(parser)
    add_processes(parser)
    add = parser.add_argument
    add_text(parser)
    add("--protocol", default="causal", choices=("causal", "window"),
        help="causal: the first P tokens of a window make the weights, the others are scored; "
        "window: the whole window makes the weights and is scored (default: %(default)s)"
        )  # fmt: skip
    add_window(parser)
    add_reading(parser)
    add("--with-baseline", action="store_true", help="also score the unquantized model")
    _add_quantizing(parser)


def _acceptance_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "acceptance", help="compare quantized weights with the unquantized ones, token by token"
    )
    add_model(parser)
    add_mesh(parser)
    add_processes(parser)
    add_text(parser)
    add_window(parser)
    _add_quantizing(parser)


def _prepare_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare", help="compute and save what a recipe needs before any prompt"
    )
    add_model(parser)
    add_mesh(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="save it here, for --prepared; replaces what an earlier ttq prepare saved",
    )  # fmt: skip
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _allocate_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "allocate", help="choose the bits of each projection of each layer within a budget"
    )
    add_model(parser)
    add_mesh(parser)
    add_processes(parser)
    add = parser.add_argument
    add("--corpus", required=True, metavar="C",
        help="text to choose the bits on, named as for ttq perplexity; do not score on it later"
        )  # fmt: skip
    add("--budget", required=True, type=float, metavar="BITS",
        help="stored bits per weight on average, everything counted")  # fmt: skip
    add("--out", required=True, type=_recipe_file, metavar="FILE.toml",
        help="write the recipe here, for --recipe")  # fmt: skip
    add("--widths", type=int, nargs="+", default=[2, 3, 4, 5], metavar="B",
        help="bits to choose from, of 2, 3, 4, 5 and 8 (default: 2 3 4 5)")  # fmt: skip
    add("--max-windows", type=int, default=4, metavar="N",
        help="measure on N windows spread over the text (default: %(default)s)")  # fmt: skip
    add_window(parser)
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _sweep_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep", help="measure perplexity at every point of a grid; can be interrupted and resumed"
    )
    add = parser.add_argument
    add("file", metavar="FILE.toml",
        help="the grid: each key is an option of ttq perplexity, a field of a recipe, or seed; its "
        "value is a list; each [[part]] table adds another grid")  # fmt: skip
    add("--out", required=True, metavar="DIR",
        help="write a row per finished cell to DIR/rows.jsonl; finished cells are not run again; "
        "several processes may share DIR")  # fmt: skip
    add("--axis", action="append", default=[], metavar="KEY=V,V",
        help="replace the file's values of one key; a corpus, calibration or model may have a "
        "label, as in corpus=wikitext2=FILE; may be repeated for other keys")  # fmt: skip
    add("--shard", metavar="I/N",
        help="run every N-th cell, starting with the I-th, to split a sweep over machines"
        )  # fmt: skip
    add("--retry", action="store_true", help="run failed cells again")
    add("--dry-run", action="store_true", help="list the cells and their state; run nothing")
    add_mesh(parser)
    add_processes(parser)
    _add_common(parser)


def _report_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="draw a sweep as tables and pictures, beside the paper's numbers"
    )
    parser.add_argument(
        "directories", nargs="+", metavar="DIR",
        help="directories of ttq sweep; report.html and report.md are written into the first",
    )  # fmt: skip
    _add_common(parser)


def _recipes_parser(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="list the recipes, or print one")
    parser.add_argument(
        "recipe", nargs="?", type=_recipe_name, metavar="NAME|FILE.toml",
        help="print this recipe as TOML, to edit and pass to --recipe",
    )  # fmt: skip
    _add_set(parser)
    _add_common(parser)


def _bench_parser(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure or estimate the kernels' speed")
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    parser = what.add_parser(
        "kernels", help="estimate cycles for a TPU, or measure times on this device"
    )
    add_bench(parser)
    _add_common(parser)


def _kernels_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "kernels", help="list which kernel serves each projection of a model, and why"
    )
    add_kernels(parser)
    add_mesh(parser)
    add_ignore_key(parser)
    _add_recipe(parser)
    _add_common(parser)


def _plan_parser(commands: Any) -> None:
    about = "tell whether a model fits a chip, and how fast it could be, without its weights"
    parser = commands.add_parser("plan", help=about, description=f"{about}.")
    add_plan(parser)
    add_mesh(parser)
    add_reading(parser)
    add_dense_memory(parser)
    add_ignore_key(parser)
    _add_recipe(parser)
    _add_common(parser)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Returns:
      A parser whose result has `command` and the options of that command.
    """
    parser = _Parser(
        prog="ttq", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ttq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="quantize a real model four ways, in minutes")
    _add_common(demo)
    _generate_parser(commands)
    _chat_parser(commands)
    _perplexity_parser(commands)
    _acceptance_parser(commands)
    _prepare_parser(commands)
    _allocate_parser(commands)
    _sweep_parser(commands)
    _report_parser(commands)
    commands.add_parser("lm-eval", add_help=False,
        help="run tasks of lm-evaluation-harness; takes lm_eval's own arguments")  # fmt: skip
    inspect = commands.add_parser(
        "inspect", help="show a model's parameters, and which of them would be quantized"
    )
    add_model(inspect)
    _add_recipe(inspect)
    _add_common(inspect)
    _recipes_parser(commands)
    _kernels_parser(commands)
    _plan_parser(commands)
    _bench_parser(commands)
    return parser
