"""The options of the commands about chips."""

import argparse

ESTIMATED = ("v5e", "v5p", "v6e", "tpu7x")
MEASURED = ("gpu", "cpu")
COMPILED = ("v4", *ESTIMATED, "t4", "a100", "l4", "h100")
PLANNED = (*COMPILED, "a100-40")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ttq bench kernels`.

    Args:
      parser: of the command.
    """
    add = parser.add_argument
    add("--chip", required=True, choices=(*ESTIMATED, *MEASURED),
        help="a TPU: its compiler's estimate, on any machine; gpu, cpu: measured on this machine"
        )  # fmt: skip
    add("--kernel", nargs="+", choices=("packed_matmul", "quantize_pack", "prefill_quantize"),
        help="kernels to run (default: all)")  # fmt: skip
    add("--bits", type=int, nargs="+", metavar="B", help="bits per code: 2, 3, 4, 5 or 8")
    add("--group-size", type=int, nargs="+", metavar="N", help="rows that share a scale")
    add("--m", type=int, nargs="+", metavar="M", help="rows of activations")
    add("--shape", nargs="+", metavar="KxN", help="shape of the weight (default: 4096x4096)")
    add("--symmetric", action="store_true", help="quantize without zero points")
    add("--scales", choices=("float", "coded", "coded4"), default="float",
        help="bfloat16 scales, or of eight or four bits and a number per column (default: float)"
        )  # fmt: skip


def _add_released(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M",
        help="as for ttq inspect; or a released model whose shapes are known without its files, "
        "such as qwen3-8b, llama-3-8b, gemma-3-1b or mixtral-8x7b",
    )  # fmt: skip


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ttq kernels`, but the recipe's and --mesh.

    Args:
      parser: of the command.
    """
    add = parser.add_argument
    _add_released(parser)
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"),
        help="dtype of the activations (default: %(default)s)")  # fmt: skip
    add("--chip", choices=(*COMPILED, "cpu"), help="default: this machine's device")
    add("--batch-size", type=int, default=1, metavar="B",
        help="prompts decoded together (default: %(default)s)")  # fmt: skip
    add("--prompt-tokens", type=int, default=512, metavar="P",
        help="tokens of the prompt (default: %(default)s)")  # fmt: skip


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ttq plan`, but the recipe's and where weights lie.

    Args:
      parser: of the command.
    """
    add = parser.add_argument
    _add_released(parser)
    add("--chip", required=True, choices=PLANNED, help="the device it would run on")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"),
        help="dtype of the unquantized weights and of the activations (default: %(default)s)"
        )  # fmt: skip
    add("--batch-size", type=int, default=1, metavar="B",
        help="prompts read together (default: %(default)s)")  # fmt: skip
    add("--prompt-tokens", type=int, default=512, metavar="P",
        help="tokens of the prompt (default: %(default)s)")  # fmt: skip
    add("--max-new-tokens", "--new-tokens", type=int, default=128, metavar="N",
        help="tokens of the answer (default: %(default)s)")  # fmt: skip
    add("--host-link", type=float, metavar="GB/S",
        help="speed at which the device reads the host's memory (default: PCIe's, see --json)"
        )  # fmt: skip
    add("--arithmetic", action="store_true",
        help="compile nothing: add up the sizes, and estimate the temporaries")  # fmt: skip
