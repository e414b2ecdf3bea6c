"""The options that say which model is loaded, and where its weights lie."""

import argparse


def add_ignore_key(parser: argparse.ArgumentParser) -> None:
    """Adds --ignore-key.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--ignore-key", action="append", default=[], metavar="NAME",
        help="a setting of the model's files that ttq does not know and that you know to change "
        "nothing; may be repeated",
    )  # fmt: skip


def add_dense_memory(parser: argparse.ArgumentParser) -> None:
    """Adds --dense-memory.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--dense-memory", default="device", choices=("device", "host"),
        help="where the unquantized weights of the blocks lie; host: in pinned host memory, "
        "fetched layer by layer whenever they are read, so that the device need not hold them "
        "beside the packed ones (default: %(default)s)",
    )  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --dtype, --dense-memory and --ignore-key.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--model", required=True, metavar="M",
        help="Hugging Face directory or hub id, .gguf file, or the alias of a model that is "
        "installed as a Python package: smollm2, gemma3-270m",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"),
        help="dtype of the unquantized weights and of the activations (default: %(default)s)",
    )  # fmt: skip
    add_dense_memory(parser)
    add_ignore_key(parser)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--mesh", metavar="data=D,model=M",
        help="share every weight among M devices, and deal the prompts of a batch out over D such "
        "groups; an axis that is left out is 1 (default: one device)",
    )  # fmt: skip


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds --prefill-chunk and --cache-dtype.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--prefill-chunk", type=int, default=0, metavar="N",
        help="read prompts of more than N tokens in parts of N, up to 128 or a multiple of 128, so "
        "that less memory is needed at a time; the weights are made from all parts (default: 0, "
        "prompts are read whole)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-dtype", choices=("float32", "bfloat16", "int8"),
        help="how keys and values are stored, and read by all attention; int8 keeps a scale for "
        "each head of each token beside them (default: as the activations)",
    )  # fmt: skip


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds --processes.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--processes", metavar="auto|HOST:PORT,COUNT,INDEX",
        help="this is one of several processes that run the same command, as on the hosts of a "
        "slice, and --mesh is over the devices of all; auto: on Cloud TPU, Slurm and other "
        "clusters that JAX knows. The first one prints the results",
    )  # fmt: skip
