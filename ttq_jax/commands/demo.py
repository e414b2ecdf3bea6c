"""`ttq demo`: the main job on a real model, on text that every machine has.

The table makes two claims. A corpus has to be the right one; the prompt always is: AWQ is therefore
calibrated on another domain than it is scored on, which is what happens to it in use. And the
default recipe gains more than the paper's, for a quarter of a bit: each row shows what it stores.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax

from ttq_jax.checkpoint import Model
from ttq_jax.commands.inspect import packed_shapes
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import DOMAINS, calibration_windows, cut_windows, sha256
from ttq_jax.evaluation.describe import describe_grid, head, megabytes, table
from ttq_jax.evaluation.perplexity import Perplexity, Protocol, stream
from ttq_jax.evaluation.preparation import load_model
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.evaluation.timings import time_answers
from ttq_jax.generate import generate
from ttq_jax.offline.calibrate import prepare
from ttq_jax.quant.names import DEFAULT
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Offline, effective_bits, kernels, stored_bytes

MODEL = "smollm2"

# Per domain, the corpus that AWQ is calibrated on there.
WRONG_CORPUS = {
    "prose": "python", "python": "prose", "javascript": "prose", "languages": "prose",
}  # fmt: skip

# Characters; what is shorter is a heading or a list.
_PARAGRAPH = 160

METHODS = {
    "none": "unquantized",
    "rtn": "RTN, no activations",
    "awq": "AWQ, another corpus",
    "ttq": "TTQ, the paper's recipe",
    DEFAULT: f"{DEFAULT}, the default recipe",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the demo is.

    Attributes:
      bits: of the codes, but for the default recipe, which keeps its own grid.
      group_size: weights that share a scale, with the same exception.
      prefill: how every method reads its prompt, see `Recipe.prefill`.
      window: W, tokens per window.
      prompt_tokens: P, the first tokens of a window, which are read; the rest is scored.
      windows: per domain.
      calibration_tokens: of AWQ's corpus.
      story_tokens: of the prompt that is continued.
      new_tokens: of its continuation.
    """

    bits: int = 3
    group_size: int = 32
    prefill: str = "full"
    window: int = 512
    prompt_tokens: int = 256
    windows: int = 6
    calibration_tokens: int = 4096
    story_tokens: int = 256
    new_tokens: int = 48

    @property
    def protocol(self) -> Protocol:
        """The causal protocol of the table."""
        return Protocol(kind="causal", window=self.window, prompt_tokens=self.prompt_tokens)

    def recipe(self, method: str) -> Recipe | None:
        """A method's recipe; all of them read the prompt in the same way."""
        if method == "none":
            return None
        if method == DEFAULT:
            return preset(method, prefill=self.prefill)
        return preset(method, bits=self.bits, group_size=self.group_size, prefill=self.prefill)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      method: a key of `METHODS`.
      perplexity: per domain.
      effective_bits: per weight of the linear layers, everything counted.
      linear_bytes: of the linear layers.
    """

    method: str
    perplexity: dict[str, float]
    effective_bits: float
    linear_bytes: int


def _offline(
    model: Model, method: str, domain: str, texts: dict[str, str], plan: Plan,
    made: dict[str, Offline], progress: Progress,
) -> Offline:  # fmt: skip
    """What a method needs on a domain, made once."""
    recipe = plan.recipe(method)
    if method != "awq":
        key, windows = method, None
    else:
        key = WRONG_CORPUS[domain]
        windows = None if key in made else calibration_windows(
            model.tokenizer, texts[key], tokens=plan.calibration_tokens, window=plan.window
        )  # fmt: skip
    if key not in made:
        if method not in {"rtn", "awq"}:
            made[key] = prepare(model, recipe)
        else:
            corpus = f" on {key}" if method == "awq" else ""
            with progress.stage(f"quantizing, {method}{corpus}") as update:
                made[key] = jax.block_until_ready(prepare(model, recipe, windows, update))
    return made[key]


def measure(model: Model, texts: dict[str, str], plan: Plan, progress: Progress) -> list[Row]:
    """The table's numbers.

    Args:
      model: the unquantized model.
      texts: per domain, keys of `WRONG_CORPUS`.
      plan: how much to measure.
      progress: where to show it.

    Returns:
      A row per method, in the order of `METHODS`.
    """
    windows = {
        name: cut_windows(model.tokenizer, text, plan.window, max_windows=plan.windows)
        for name, text in texts.items()
    }
    made: dict[str, Offline] = {}
    for method in METHODS:
        for domain in windows:
            _offline(model, method, domain, texts, plan, made, progress)
    total, done, rows = len(METHODS) * sum(map(len, windows.values())), 0, []
    with progress.stage("scoring") as update:
        for method in METHODS:
            recipe, scores = plan.recipe(method), {}
            for domain, tokens in windows.items():
                offline = _offline(model, method, domain, texts, plan, made, progress)
                running: Perplexity | None = None
                for running in stream(
                    model, tokens, recipe=recipe, offline=offline, protocol=plan.protocol
                ):
                    done += 1
                    update(done, total, f"{method} on {domain} {running.perplexity:.1f}")
                assert running is not None
                scores[domain] = running.perplexity
            shapes = packed_shapes(model, recipe)
            linear = stored_bytes(kernels(shapes["layers"]))
            rows.append(
                Row(method=method, perplexity=scores, effective_bits=effective_bits(shapes),
                    linear_bytes=linear)
            )  # fmt: skip
    return rows


def story_prompt(model: Model, text: str, plan: Plan) -> str:
    """The prompt that is continued: a text's first paragraphs, about `story_tokens` long.

    Args:
      model: its tokenizer counts.
      text: a domain's; headings and lists are left out.
      plan: how long.

    Returns:
      A text that ends with a sentence, where it has one that ends.

    Raises:
      ConfigError: the text is too short.
    """
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if len(p) >= _PARAGRAPH]
    ids = model.tokenizer.encode("\n\n".join(paragraphs[:50]), add_bos=False)
    if len(ids) <= plan.story_tokens:
        raise ConfigError(f"expected a text of more than {plan.story_tokens} tokens")
    start = model.tokenizer.decode(ids[: plan.story_tokens])
    return start[: start.rfind(". ") + 1] or start


def continue_story(
    model: Model, text: str, plan: Plan, progress: Progress
) -> dict[str, dict[str, Any]]:
    """One prompt, continued by the default recipe and by the unquantized model.

    Args:
      model: the unquantized model.
      text: its beginning is the prompt.
      plan: how long.
      progress: where to show it.

    Returns:
      Per method, JSON data.
    """
    prompt, out = story_prompt(model, text, plan), {}
    recipes = {method: plan.recipe(method) for method in ("none", DEFAULT)}
    for method, recipe in recipes.items():
        with progress.stage(f"generating, {METHODS[method]}"):
            made = generate(model, [prompt], recipe=recipe, max_new_tokens=plan.new_tokens)
        out[method] = {
            "prompt": prompt,
            "text": made.texts[0],
            "prompt_tokens": made.prompt_tokens[0],
            "new_tokens": len(made.tokens[0]),
        }
    with progress.stage("timing, both in turns"):
        # Without an end token, so that both write as much.
        endless = dataclasses.replace(model, eos_ids=())
        times = time_answers(endless, [prompt], recipes, max_new_tokens=plan.new_tokens, runs=3)
    for method, one in times.items():
        out[method] |= {"timings": one.describe(), "in_words": one.in_words()}
    return out


def demo_table(rows: list[Row]) -> str:
    """The rows for people, with AWQ's corpora under its numbers.

    Args:
      rows: from `measure`.

    Returns:
      The lines.
    """
    domains = list(rows[0].perplexity)
    cells = [["", *domains, "bits/weight", "linear layers"]]
    for row in rows:
        scores = [f"{row.perplexity[d]:.2f}" for d in domains]
        size = [f"{row.effective_bits:.2f}", megabytes(row.linear_bytes)]
        cells.append([METHODS[row.method], *scores, *size])
        if row.method == "awq":
            cells.append(["  calibrated on", *(WRONG_CORPUS[d] for d in domains), "", ""])
    return table(cells, indent="  ")


def _caption(plan: Plan, result: dict[str, Any]) -> str:
    reads = "its own quantized" if plan.prefill == "quantized" else "the unquantized"
    default = plan.recipe(DEFAULT)
    assert default is not None
    own = describe_grid(default)
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    sources = "\n".join(f"  {d.name}: {d.source}" for d in DOMAINS)
    return (
        f"  RTN, AWQ and TTQ: {plan.bits} bits, group {plan.group_size}. {DEFAULT}: {own}.\n"
        f"  Each domain has {plan.windows} windows of {plan.window} tokens. The first "
        f"{plan.prompt_tokens} are the prompt, the other {plan.window - plan.prompt_tokens} are "
        "scored.\n"
        f"  In every row {reads} weights read the prompt. bits/weight: of the linear layers.\n"
        f"  AWQ is calibrated on {plan.calibration_tokens} tokens of the domain named under it.\n"
        "  On so little text a difference of a few percent means nothing: see `ttq perplexity`.\n"
        f"{sources}\n"
        "  SmolLM2-135M-Instruct, whose file is rounded to 4 bits already (Q4_1): "
        '"unquantized" is what the file says.\n'
        f"  {result['device']}; {versions}; {clock(result['seconds'])} in all."
    )


def _print(plan: Plan, rows: list[Row], result: dict[str, Any]) -> None:
    told = result["generation"]
    print_text(f"Perplexity after reading a prompt (lower is better)\n\n{demo_table(rows)}\n")
    print_text(f"{_caption(plan, result)}\n")
    end = told[DEFAULT]["prompt"][-160:].split(" ", 1)[-1]
    length = told[DEFAULT]["prompt_tokens"]
    print_text(f"A prompt of {length} tokens, ending in\n\n  … {_fold(end)}\n")
    for method in (DEFAULT, "none"):
        one = told[method]
        size = megabytes(next(r.linear_bytes for r in rows if r.method == method))
        print_text(f"{METHODS[method]}: linear layers {size}, {one['in_words']}\n")
        print_text(f"  {_fold(one['text'])}\n")


def _fold(text: str) -> str:
    """Indents the lines after the first."""
    return text.strip().replace("\n", "\n  ")


def run(args: argparse.Namespace, progress: Progress, plan: Plan = Plan()) -> None:
    """`ttq demo`.

    Args:
      args: its options.
      progress: where to show it.
      plan: how much to measure.
    """
    start = time.perf_counter()
    texts = {domain.name: domain.read() for domain in DOMAINS}
    model, _ = load_model(MODEL, "float32", progress)
    rows = measure(model, texts, plan, progress)
    told = continue_story(model, texts["prose"], plan, progress)
    result = head(model, DEFAULT, plan.recipe(DEFAULT), rows[-1].effective_bits) | {
        "plan": dataclasses.asdict(plan),
        "table": [dataclasses.asdict(row) for row in rows],
        "awq_calibrated_on": WRONG_CORPUS,
        "domains": {d.name: {"source": d.source, "sha256": sha256(texts[d.name])} for d in DOMAINS},
        "generation": told,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if args.json:
        print_json(result)
    else:
        _print(plan, rows, result)
