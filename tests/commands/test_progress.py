import io
import sys

import pytest

from ttq_jax.evaluation import progress as progress_module
from ttq_jax.evaluation.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows: a carriage return goes back, what follows overwrites."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_clock():
    assert [clock(s) for s in (0.04, 59.94, 60, 245.7)] == ["0.0 s", "59.9 s", "1:00", "4:05"]


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_stage_says_what_it_does_and_how_long_is_left(monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", out := kind())
    monkeypatch.setattr(progress_module, "_REDRAW", 0.02)
    monkeypatch.setattr(progress_module, "_LOG_EVERY", 0.02)
    progress = Progress()
    with progress.stage("scoring") as update:
        import time

        for done in range(1, 4):
            update(done, 4, f"perplexity {done}")
            time.sleep(0.1)
    written = out.getvalue()
    assert "50 %, perplexity 2" in written
    assert "s left" in written
    assert ("\r" in written) == (kind is Terminal)
    last = screen(written)[-2]
    assert last.startswith("ttq: scoring: 0.")
    assert last.endswith("s, perplexity 3")


def test_a_failed_stage_leaves_the_line_to_the_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", out := Terminal())
    with pytest.raises(ValueError, match="no"), Progress().stage("loading"):
        raise ValueError("no")
    assert screen(out.getvalue()) == [""]


def test_disabled_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", out := Terminal())
    progress = Progress(enabled=False)
    with progress.stage("loading") as update:
        update(1, 2)
    progress.note("something")
    progress.clear()
    assert out.getvalue() == ""


def test_lines_do_not_wrap(monkeypatch):
    monkeypatch.setattr(sys, "stderr", out := Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    with Progress().stage("a very long description of what is being done"):
        pass
    assert len(out.getvalue().split("\r")[1]) <= 19
