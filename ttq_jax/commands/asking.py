"""The options of `ttq generate` and `ttq chat` that say what is asked and how tokens are chosen."""

import argparse


def _drafts(text: str) -> int | str:
    """A number of drafts, or auto.

    Raises:
      ArgumentTypeError: neither.
    """
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number, 0 to 16, or auto, got {text!r}"
        ) from None


def add_system(parser: argparse.ArgumentParser) -> None:
    """Adds --system.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--system", metavar="TEXT",
        help="begin each conversation with this system message, if the chat template has a place "
        "for one",
    )  # fmt: skip


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Adds --chat, --system and --stream.

    Args:
      parser: of the command.
    """
    add = parser.add_argument
    add("--chat", action="store_true",
        help="the prompts are messages to an assistant: use the model's chat template, and stop "
        "where it ends a turn. Each line of a prompts file F.jsonl is then a conversation: a list "
        "of {\"role\": …, \"content\": …}, or an object with such a list as messages")  # fmt: skip
    add_system(parser)
    add("--stream", action="store_true", help="print each answer while it is decoded")


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """Adds --conversation.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--conversation", metavar="DIR",
        help="the prompts are turns of one conversation. DIR keeps it between calls: in a chat its "
        "messages, and the activations' moments if the recipe's moments.decay, the weight of the "
        "last turn in the next one, is above 0. Without messages it must be, and DIR keeps no text",
    )  # fmt: skip


def add_asking(parser: argparse.ArgumentParser, most: int) -> None:
    """Adds the length of an answer and the sampling.

    Args:
      parser: of the command.
      most: new tokens by default.
    """
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=most, metavar="N",
        help="generate at most N tokens (default: %(default)s)")  # fmt: skip
    add("--temperature", type=float, default=0.0,
        help="sampling temperature; 0 takes the likeliest token (default: 0)")  # fmt: skip
    add("--top-k", type=int, default=0, metavar="K",
        help="sample from the K likeliest tokens; 0 from all (default: 0)")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P",
        help="sample from the likeliest tokens that together reach probability P "
        "(default: %(default)s)")  # fmt: skip
    add("--seed", type=int, help="seed of the sampling (default: 0)")
    add("--speculate", type=_drafts, default=0, metavar="K|auto",
        help="the quantized weights draft K tokens at a time, 1 to 16, and the unquantized ones "
        "verify them: the answer is the unquantized model's. auto measures what drafts and "
        "verifications cost here, and drafts as many as pay, or none (default: 0, the quantized "
        "weights answer)")  # fmt: skip
