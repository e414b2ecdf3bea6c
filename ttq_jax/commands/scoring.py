"""The options that say which text is scored, and in which windows."""

import argparse


def add_text(parser: argparse.ArgumentParser) -> None:
    """Adds --corpus, one text, and --max-windows.

    Args:
      parser: of the command.
    """
    add = parser.add_argument
    add("--corpus", required=True, metavar="C",
        help="UTF-8 text file, JSON lines (.jsonl), hf:NAME[:CONFIG][:SPLIT] for a Hugging Face "
        "dataset (short names: hf:wikitext2, hf:ptb, hf:c4, hf:gsm8k, hf:dolly), or builtin:prose, "
        "builtin:python, …; a suffix such as [50%%:] takes a part")  # fmt: skip
    add("--max-windows", type=int, metavar="N", help="read only its first N windows")


def add_window(parser: argparse.ArgumentParser) -> None:
    """Adds --window and --prompt-tokens.

    Args:
      parser: of the command.
    """
    add = parser.add_argument
    add("--window", type=int, default=512, metavar="W",
        help="tokens per window (default: %(default)s)")  # fmt: skip
    add("--prompt-tokens", type=int, default=256, metavar="P",
        help="causal protocol: the first P tokens of a window make the weights, the others are "
        "scored (default: %(default)s)")  # fmt: skip
