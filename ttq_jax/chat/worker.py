"""A process that renders chat templates, and nothing else.

A template is a program that came with a download. Jinja's sandbox keeps it from files and from
Python, not from running for ever: that takes a process with limits. `render.Renderer` starts this
file as one. It reads a JSON object a line and answers with one.
"""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 5
"""Of computing, for one conversation."""

PATIENCE = 300
"""Seconds of anything, for all conversations of a call."""

_MEMORY = 2**30
_LONGEST = 2**22


def _limit_memory() -> None:
    """Allows `_MEMORY` bytes more than are taken now, where the system can count them."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit_seconds() -> None:
    """Has the system end this process after `SECONDS` more of computing."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard) if hard > 0 else soft, hard))


def _rendered(asked: dict[str, Any], render: Any) -> list[dict[str, str]]:
    """Per conversation {"text": …}, or {"error": …}."""
    import jinja2

    out = []
    for messages, answer_next in asked["conversations"]:
        _limit_seconds()
        try:
            (text,), _ = render(
                conversations=[messages], chat_template=asked["template"],
                add_generation_prompt=answer_next, **asked["tokens"],
            )  # fmt: skip
            long = f"it makes a text of {len(text)} characters; at most {_LONGEST} are read"
            out.append({"error": long} if len(text) > _LONGEST else {"text": text})
        except jinja2.TemplateSyntaxError as e:
            out.append({"error": f"line {e.lineno}: {e.message}"})
        except Exception as e:  # whatever a template may raise
            out.append({"error": f"{e}" or type(e).__name__})
    return out


def main() -> None:
    """Answers until standard input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin:
        print(json.dumps(_rendered(json.loads(line), render_jinja_template)), flush=True)


if __name__ == "__main__":
    main()
