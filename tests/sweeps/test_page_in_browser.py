"""A report's page in a browser: on a phone and on a desk, in the light and in the dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from ttq_jax.commands.main import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
KEPT = Path(__file__).parents[2] / "experiments" / "results" / "table1_smollm2"
SCHEMES = {"dark": "0", "light": "1"}

# A window of a browser without a screen is 500 pixels wide or more; a frame can be narrower.
FRAME = """
<!DOCTYPE html><title>-</title><iframe id="page" width="{width}" height="800" srcdoc="{page}">
</iframe>
<script>
page.addEventListener("load", () => {{
  const inside = page.contentDocument, root = inside.documentElement;
  const text = cells => [...cells].map(cell => cell.textContent);
  const table = inside.querySelectorAll("table")[{table}], heads = table.tHead.rows[0].cells;
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent);
  const button = heads[1].querySelector("button"), sorted = [];
  for (let i = 0; i < 2; i++) {{
    button.click();
    sorted.push([heads[1].getAttribute("aria-sort"), column()]);
  }}
  const outside = [...inside.body.querySelectorAll("*")].filter(
    one => !one.closest(".wide table") && one.getBoundingClientRect().right > root.clientWidth + 1
  ).map(one => one.tagName);
  const links = [...inside.querySelectorAll("nav a")].map(link => link.getAttribute("href"));
  const images = [...inside.images].map(one => one.naturalWidth * one.clientWidth);
  const style = page.contentWindow.getComputedStyle(inside.body);
  const seen = {{
    width: root.clientWidth, scroll: root.scrollWidth, outside, sorted, images,
    dead: links.filter(link => !inside.getElementById(link.slice(1))), links: links.length,
    paper: style.backgroundColor, ink: style.color, font: parseFloat(style.fontSize),
  }};
  document.title = JSON.stringify(seen);
}});
</script>
"""


def browse(scheme, *options):
    """What the browser prints, and the lines of its console."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", "--virtual-time-budget=10000",
               f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("browser")
    shutil.copy(KEPT / "rows.jsonl", directory)
    assert main(["report", str(directory), "--no-compilation-cache", "--quiet"]) == 0
    return directory / "report.html"


def seen(page, width, scheme="light"):
    """What the page looks like in a frame."""
    frame = page.with_name("frame.html")
    text = html.escape(page.read_text("utf-8"))
    frame.write_text(FRAME.format(width=width, page=text, table=2), "utf-8")
    out, console = browse(scheme, "--dump-dom", frame.as_uri())
    assert not console
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", out)[1]))


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(page, width):
    found = seen(page, width)
    assert found["width"] <= width
    assert found["scroll"] <= found["width"]
    assert found["outside"] == []
    assert len(found["images"]) == 4
    assert min(found["images"]) > 0
    assert found["font"] >= 15


def test_contents_lead_somewhere_and_tables_sort_by_click(page):
    found = seen(page, 390)
    assert found["links"] >= 8
    assert found["dead"] == []
    (up, rising), (down, falling) = found["sorted"]
    assert (up, down) == ("ascending", "descending")
    bits = [float(cell) for cell in rising]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]
    assert falling == [f"{value:.2f}" for value in reversed(bits)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_and_its_pictures_follow_the_scheme(page, scheme, tmp_path):
    found = seen(page, 390, scheme)
    paper, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) / 765 for key in
                  ("paper", "ink"))  # fmt: skip
    assert (paper < 0.2 < 0.8 < ink) if scheme == "dark" else (ink < 0.2 < 0.8 < paper)
    # The whole page, pictures too: one that stayed light would be a bright patch in the dark.
    shot = tmp_path / "page.png"
    browse(scheme, "--window-size=700,4000", f"--screenshot={shot}", page.as_uri())
    grey = matplotlib.image.imread(shot)[..., :3].mean(-1)
    share = (grey > 0.5).mean()
    assert share < 0.2 if scheme == "dark" else share > 0.8
