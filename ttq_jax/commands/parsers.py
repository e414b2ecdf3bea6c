"""What can be said on the command line: every command's options and their help.

Nothing here imports jax: `--help` and a mistyped option answer at once.
"""

import argparse
from typing import Any, NoReturn

from ttq_jax._version import __version__
from ttq_jax.quant.names import DEFAULT, METHODS, misnamed

ESTIMATED = ("v5e", "v5p", "v6e", "tpu7x")
MEASURED = ("gpu", "cpu")
COMPILED = ("v4", *ESTIMATED, "t4", "a100", "l4", "h100")

_DESCRIPTION = """\
Test-time quantization of language models: the prompt itself calibrates the low-bit weights that
it is answered with (TTQ, arXiv:2603.19296)."""

_EPILOG = """\
exit codes: 0 done, 2 unusable input, 130 interrupted. Results go to stdout, progress to stderr.

Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/ttq_jax/xla, else
~/.cache/ttq_jax/xla, so that a second start need not compile again (--cache-dir,
--no-compilation-cache)."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ttq: error: {message} (see {self.prog} --help)\n")


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output and environment")
    group.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group.add_argument("--cache-dir", metavar="DIR", help="where compiled programs are kept")
    group.add_argument(
        "--no-compilation-cache", action="store_true", help="neither read nor keep them"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M",
        help="a Hugging Face directory or hub id, a .gguf file, or the alias of a model that is a "
        "Python package: smollm2, gemma3-270m",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"),
        help="of the unquantized weights and the activations (default: %(default)s)",
    )  # fmt: skip


def _recipe_name(text: str) -> str:
    """A preset's name or a file's.

    Raises:
      ArgumentTypeError: neither.
    """
    if wrong := misnamed(text):
        raise argparse.ArgumentTypeError(wrong)
    return text


def _recipe_file(text: str) -> str:
    """A file that --recipe will take.

    Raises:
      ArgumentTypeError: another ending.
    """
    if not text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .toml, got {text!r}")
    return text


def _add_set(parser: Any) -> None:
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="AXIS.KEY=VALUE",
        help="change any other choice, as in scale=searched or rounding.damping=0.3; may be "
        "repeated, and counts after the options above",
    )  # fmt: skip


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quantization", "What is not given is as the recipe has it; ttq recipes lists the recipes, "
        "ttq recipes NAME prints one with all its choices."
    )  # fmt: skip
    add = group.add_argument
    add("--recipe", "--method", dest="method", type=_recipe_name, default=DEFAULT,
        metavar="NAME|FILE.toml",
        help=f"{', '.join(METHODS)}, or a file (default: %(default)s)")  # fmt: skip
    add("--bits", type=int, metavar="B", help="2, 3, 4, 5 or 8")
    add("--group-size", type=int, metavar="N",
        help="weights of a column that share a scale: a multiple of 8, or -1 for all of them"
        )  # fmt: skip
    add("--rank", type=int, metavar="R", help="keep each weight's best rank-R part; 0 for none")
    add("--symmetric", action=argparse.BooleanOptionalAction, help="no zero points, or with them")
    add("--clip", action="store_true",
        help="search each group's range before rounding to nearest")  # fmt: skip
    add("--alpha", type=float, help="power-law scale: exponent of the channel scale")
    add("--lam", type=float, metavar="LAMBDA",
        help="power-law scale: added to the relative moment")  # fmt: skip
    add("--p", type=float, help="power-law scale: exponent of the activation moment")
    add("--prefill", choices=("full", "quantized"),
        help="full: the prompt is read by the unquantized weights; quantized: by the ones made "
        "from it, layer by layer, as in the paper")  # fmt: skip
    add("--select", metavar="REGEX",
        help="which projections are quantized, by path, as in layers/(q|down)")  # fmt: skip
    add("--zero-point", choices=("integer", "float"), help="how zero points are stored")
    add("--store-dtype", choices=("bfloat16", "float16", "float32"),
        help="of scales, zero points and low-rank factors")  # fmt: skip
    _add_set(group)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration (for recipes that read a corpus: awq, gptq)")
    group.add_argument(
        "--calibration", metavar="FILE",
        help="text file or hf:NAME whose activations such a recipe uses",
    )  # fmt: skip
    group.add_argument(
        "--calibration-tokens", type=int, default=8192, metavar="N",
        help="read its first N tokens (default: %(default)s)",
    )  # fmt: skip


def _add_prepared(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--prepared", metavar="DIR", help="from ttq prepare, with the same model and recipe"
    )
    group.add_argument(
        "--save-recipe", type=_recipe_file, metavar="FILE.toml",
        help="write the recipe that is used, all options applied",
    )  # fmt: skip


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue prompts from weights made for them")
    _add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt")
    prompts.add_argument(
        "--prompts-file", metavar="F", help="UTF-8 text file, a prompt per line; - reads stdin"
    )
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest; 0 keeps all")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="keep the likeliest that reach probability P (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--batch-size", type=int, default=1, metavar="B",
        help="prompts read together; they share one set of quantized weights unless --per-prompt "
        "(default: %(default)s)")  # fmt: skip
    add("--per-prompt", action="store_true", help="in a batch, quantize for each prompt apart")
    add("--conversation", metavar="DIR",
        help="the prompts are turns of one conversation: of an earlier turn not the text but the "
        "activations count for the next one's weights, kept here between calls; needs "
        "moments.decay above 0, what a turn still counts at the next one")  # fmt: skip
    _add_prepared(parser)
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _add_window(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--window", type=int, default=512, metavar="W", help="tokens (default: %(default)s)")
    add("--prompt-tokens", type=int, default=256, metavar="P",
        help="of a window (causal): the first P make the weights and the rest judges them "
        "(default: %(default)s)")  # fmt: skip


def _perplexity_parser(commands: Any) -> None:
    parser = commands.add_parser("perplexity", help="score a text, window by window")
    _add_model(parser)
    add = parser.add_argument
    add("--corpus", required=True, metavar="C",
        help="UTF-8 text file, JSON lines (.jsonl), hf:NAME[:CONFIG][:SPLIT] for a Hugging Face "
        "dataset (short names: hf:wikitext2, hf:ptb, hf:c4, hf:gsm8k, hf:dolly), or builtin:prose, "
        "builtin:python, …; [50%%:] after it takes a part")  # fmt: skip
    add("--protocol", default="causal", choices=("causal", "window"),
        help="causal: weights from the first P tokens of a window, the rest is scored; window: "
        "weights from the window that is scored (default: %(default)s)")  # fmt: skip
    _add_window(parser)
    add("--max-windows", type=int, metavar="N", help="score only the first N windows")
    add("--with-baseline", action="store_true", help="score the unquantized model too")
    _add_prepared(parser)
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _prepare_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare", help="make and save what a recipe needs besides the prompt"
    )
    _add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="where it is saved, for --prepared; what an earlier prepare left there is replaced",
    )  # fmt: skip
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _allocate_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "allocate", help="give each layer's projections the width that they need"
    )
    _add_model(parser)
    add = parser.add_argument
    add("--corpus", required=True, metavar="C",
        help="the text that widths are judged by, as for perplexity; not the one that is scored "
        "later")  # fmt: skip
    add("--budget", required=True, type=float, metavar="BITS",
        help="stored bits per weight on average, scales and all else counted")  # fmt: skip
    add("--out", required=True, type=_recipe_file, metavar="FILE.toml",
        help="where the recipe is written, for --recipe")  # fmt: skip
    add("--widths", type=int, nargs="+", default=[2, 3, 4, 5], metavar="B",
        help="to choose from: 2, 3, 4, 5, 8 (default: 2 3 4 5)")  # fmt: skip
    add("--max-windows", type=int, default=4, metavar="N",
        help="of the text, spread over it (default: %(default)s)")  # fmt: skip
    _add_window(parser)
    _add_recipe(parser)
    _add_calibration(parser)
    _add_common(parser)


def _sweep_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep", help="perplexity at every point of a grid, in a table that survives being killed"
    )
    add = parser.add_argument
    add("file", metavar="FILE.toml",
        help="each key an option of ttq perplexity, a recipe's field or seed, its value a list; "
        "[[part]] tables add further products")  # fmt: skip
    add("--out", required=True, metavar="DIR",
        help="where finished cells are kept, rows.jsonl; what is there is not done again, and "
        "several processes may share it")  # fmt: skip
    add("--axis", action="append", default=[], metavar="KEY=V,V",
        help="in the place of the file's values; a corpus, calibration or model may have a label, "
        "as in corpus=wikitext2=FILE; may be repeated")  # fmt: skip
    add("--shard", metavar="I/N", help="only every N-th cell, from the I-th, for several machines")
    add("--retry", action="store_true", help="run the cells again that failed before")
    add("--dry-run", action="store_true", help="list the cells and what is done, run nothing")
    _add_common(parser)


def _report_parser(commands: Any) -> None:
    parser = commands.add_parser("report", help="a sweep as tables and pictures, beside the paper")
    parser.add_argument(
        "directories", nargs="+", metavar="DIR",
        help="of ttq sweep; report.html and report.md are written into the first",
    )  # fmt: skip
    _add_common(parser)


def _recipes_parser(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="which recipes there are, what one consists of")
    parser.add_argument(
        "recipe", nargs="?", type=_recipe_name, metavar="NAME|FILE.toml",
        help="print this one as TOML, to be edited and given to --recipe",
    )  # fmt: skip
    _add_set(parser)
    _add_common(parser)


def _bench_parser(commands: Any) -> None:
    bench = commands.add_parser("bench", help="what the kernels reach")
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    parser = what.add_parser(
        "kernels", help="estimated cycles for a TPU, or times on the device that is there"
    )
    add = parser.add_argument
    add(
        "--chip",
        required=True,
        choices=(*ESTIMATED, *MEASURED),
        help="a TPU: its compiler's estimate, on any machine; gpu, cpu: measured on this one",
    )
    add(
        "--kernel",
        nargs="+",
        choices=("packed_matmul", "quantize_pack", "prefill_quantize"),
        help="default: all",
    )
    add("--bits", type=int, nargs="+", metavar="B", help="2, 3, 4, 5 or 8")
    add("--group-size", type=int, nargs="+", metavar="N", help="rows that share a scale")
    add("--m", type=int, nargs="+", metavar="M", help="rows of activations")
    add("--shape", nargs="+", metavar="KxN", help="of the weight (default: 4096x4096)")
    add("--symmetric", action="store_true", help="no zero points")
    _add_common(parser)


def _kernels_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "kernels", help="which kernel serves which projection of a model, and why"
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="M",
        help="as for inspect; or qwen3-0.6b, qwen3-1.7b, qwen3-8b, llama-3-8b, gemma-3-1b, "
        "opt-6.7b, whose sizes are known without their weights",
    )
    add(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="of the activations (default: %(default)s)",
    )
    add("--chip", choices=(*COMPILED, "cpu"), help="default: the device that is there")
    add("--batch-size", type=int, default=1, metavar="B", help="default: %(default)s")
    add("--prompt-tokens", type=int, default=512, metavar="P", help="default: %(default)s")
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
    demo = commands.add_parser("demo", help="a real model, quantized four ways, in minutes")
    _add_common(demo)
    _generate_parser(commands)
    _perplexity_parser(commands)
    _prepare_parser(commands)
    _allocate_parser(commands)
    _sweep_parser(commands)
    _report_parser(commands)
    commands.add_parser(
        "lm-eval", add_help=False,
        help="tasks of EleutherAI's lm-evaluation-harness; takes lm_eval's own arguments",
    )  # fmt: skip
    inspect = commands.add_parser("inspect", help="what is in a model, and what would be quantized")
    _add_model(inspect)
    _add_recipe(inspect)
    _add_common(inspect)
    _recipes_parser(commands)
    _kernels_parser(commands)
    _bench_parser(commands)
    return parser
