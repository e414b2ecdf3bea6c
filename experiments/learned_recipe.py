"""How far tuning goes: the scale's α and λ and a clipping factor, learned by gradient descent.

Claim     Not far. α, λ and one clipping factor for each projection of each layer, learned on
          WikiText-2, leave 0.928 [0.870, 0.985] of the gap of the closed form (α = 0.5, λ = 0.4,
          whole ranges) at 3 bits; one of each for the whole model ends where it began (α = 0.52,
          λ = 0.43, c = 0.97) and leaves 1.038 [0.982, 1.091]. What learns nothing does better: a
          clip search in each group leaves 0.747 [0.705, 0.790], second-order rounding 0.592
          [0.537, 0.652].
Command   T="python experiments/learned_recipe.py train --model smollm2 --window 320 --every 12
              --corpus wikitext2=TRAIN"; L=experiments/results/learned_recipe_wikitext2
          $T --variant global --steps 24 --learning-rate 0.05 --held-out 4 --out ${L}_global.json
          $T --variant projection --steps 24 --learning-rate 0.05 --held-out 8
              --start ${L}_global.json --out ${L}_projection.json
          $T --variant layer --steps 36 --held-out 8
              --start ${L}_projection.json --out ${L}_layer.json
          python experiments/learned_recipe.py score --learned ${L}_*.json --windows 8
              --corpus wikitext2=TEST --corpus ptb=TEST --corpus c4=VALIDATION
              --corpus gsm8k=TEST.jsonl --out experiments/results/learned_recipe_scores.jsonl
          python experiments/learned_recipe.py report --picture
              experiments/results/learned_recipe_smollm2.png
              experiments/results/learned_recipe_scores.jsonl --learned ${L}_*.json
Cost      SmolLM2-135M: 3.3 s of CPU time per step (windows of 320), 13 to 18 s by the clock on
          the 2 busy cores it was measured on; 2.5 GB. Scoring as in quality.py. A training that was
          cut goes on from its last multiple of --every; rows of scores are kept, more windows are
          added.
Expect    a gap of 0.475 for ttq, 0.493 / 0.465 / 0.441 learned (global, projection, layer), 0.355
          with clip search, 0.281 by second order. The projections want different α: 0.88 for v,
          0.36 to 0.57 for the rest. What is gained on WikiText-2 and GSM8K does not show on PTB and
          C4. The descent is short and had not converged for layers: the held-out loss still fell
          when the rate reached zero. At 3 bits the straight-through gradient is not quite that of
          the mean loss. So tuning may reach further than this descent did; and 8 windows per text
          tell no finer differences.

Three numbers are learned: α and λ of D = (m + λ)^α and c, the part of each group's range that the
grid spans; once for the model (`global`), for each kind of projection (`projection`), or for each
projection of each layer (`layer`). The moments m are each window's own, of its first P tokens, read
by the unquantized weights: what is learned is a recipe, not weights. The loss is that of the causal
protocol, over the tokens after the prompt: the divergence of the unquantized model's prediction
from the quantized one's (`kl`, the default), or the text's negative log-likelihood (`nll`).
Rounding has no derivative; it is taken for the identity wherever a weight lies within the grid
(straight-through), while scales and zero points have theirs.

The default windows are those of the evaluation; shorter ones, with the same prompt, take fewer
scored tokens from more texts in the same time. Every text is given by path, NAME=FILE, as for
quality.py.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from quality import Results, corpus_text, gaps, interval, protocol_data, spread

import ttq_jax as ttq
from ttq_jax.calibrate import prepare
from ttq_jax.checkpoint import CheckpointError
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.corpora import CorpusError, sha256
from ttq_jax.linear import linear
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits, plain
from ttq_jax.perplexity import Protocol, score_window
from ttq_jax.prefill import decoded_shapes, observing
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid, decode, encode, fit_range, split_groups, store
from ttq_jax.quant.moments import Reads, p_mean
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import PowerLaw, SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.report import device, table, versions
from ttq_jax.types import Cache, Moments, Offline, Params, effective_bits, kernels

VARIANTS = ("global", "projection", "layer")
LOSSES = ("kl", "nll")
START = PowerLaw()
# The clip's bounds; beyond the lower one a 3-bit grid would have lost most weights.
LEAST_CLIP = 0.1


@struct.dataclass
class Theta:
    """What is learned; each float32[n, l] with n = 1 or the projections, l = 1 or the layers.

    λ is kept as its logarithm, which keeps it positive.
    """

    alpha: Any
    log_lam: Any
    clip: Any


def default_theta() -> Theta:
    """The closed form's values."""
    full = partial(jnp.full, (1, 1), dtype=jnp.float32)
    return Theta(alpha=full(START.alpha), log_lam=full(np.log(START.lam)), clip=full(1.0))


def at_resolution(theta: Theta, variant: str, projections: int, layers: int) -> Theta:
    """The same numbers, as many times as the variant has them.

    Raises:
      SystemExit: there are more of them than that.
    """
    shape = {"global": (1, 1), "projection": (projections, 1), "layer": (projections, layers)}
    try:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, shape[variant]), theta)
    except ValueError as e:
        raise SystemExit(
            f"start: expected at most {shape[variant]} numbers of each kind for variant {variant}, "
            f"got {theta.alpha.shape}; start from a coarser variant of the same model"
        ) from e


def by_projection(theta: Theta, names: list[str], layers: int) -> dict[str, Theta]:
    """Per projection the numbers of each layer, [L], whatever the variant."""
    whole = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(names), layers)), theta)
    return {name: jax.tree.map(lambda a, i=i: a[i], whole) for i, name in enumerate(names)}


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def encode_through(groups: jax.Array, scales: jax.Array, zeros: jax.Array, grid: Grid) -> jax.Array:
    """The codes of `encode`, with the derivative of what they round: straight through."""
    return encode(groups, scales, zeros, grid)


@encode_through.defjvp
def _encode_jvp(grid: Grid, at: tuple, moved: tuple) -> tuple[jax.Array, jax.Array]:
    unrounded, change = jax.jvp(lambda g, s, z: g / s[:, None] + z[:, None], at, moved)
    # A code at the end of the grid stays there: beyond it a weight has no say.
    inside = (unrounded >= 0) & (unrounded <= 2**grid.bits - 1)
    return encode(*at, grid), jnp.where(inside, change, jnp.zeros_like(change))


def fake_quantized(w: jax.Array, m: jax.Array, theta: Theta, grid: Grid) -> jax.Array:
    """What a weight [d_in, d_out] stands for once it is quantized; m [d_in] relative moments."""
    w = w.astype(jnp.float32)
    # The floor is PowerLaw's: a channel that no token excites.
    d = jnp.maximum((m + jnp.exp(theta.log_lam)) ** theta.alpha, 1e-4)
    d = store(d, grid).astype(jnp.float32)
    groups = split_groups(w * d[:, None], grid.rows_per_group(len(w)))
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    scales, zeros = fit_range(theta.clip * low, theta.clip * high, grid)
    codes = encode_through(groups, scales, zeros, grid)
    dense = decode(codes, scales, zeros).reshape(-1, w.shape[1])[: len(w)]
    return dense / d[:, None]


def fake_project(grid: Grid) -> Callable[..., tuple[dict[str, jax.Array], None]]:
    """The `Project` that multiplies by what the weights are after quantization."""

    # Recomputed on the way back: a layer's weights in every stage of rounding are never kept.
    @partial(jax.checkpoint, static_argnums=(0,), prevent_cse=False)
    def project(
        site: str, x: jax.Array, weights: dict[str, Params], layer: dict[str, Any]
    ) -> tuple[dict[str, jax.Array], None]:
        ys = {}
        for name, leaf in weights.items():
            w = fake_quantized(leaf["kernel"].kernel, layer["m"][site], layer["theta"][name], grid)
            ys[name] = linear(x, w, leaf.get("bias"))
        return ys, None

    return project


def relative(moments: Moments) -> jax.Array:
    """The channels' root mean squares over their mean, as `PowerLaw` takes them; [d_in]."""
    m = p_mean(moments, START.p)
    mean = jnp.mean(m)
    return jnp.where(mean > 0, m / jnp.where(mean > 0, mean, 1.0), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a loss depends on besides weights, text and θ; static under jit."""

    config: ModelConfig
    protocol: Protocol
    grid: Grid

    def read_prompt(
        self, params: Params, tokens: jax.Array
    ) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
        """The unquantized model's last state after the prompt, its cache, relative moments."""
        p = self.protocol
        read, valid = tokens[None, : p.prompt_tokens], jnp.ones((1, p.prompt_tokens), bool)
        cache = empty_cache(self.config, 1, p.window, params["embed"]["embedding"].dtype)
        hidden, cache, seen = forward(
            self.config, params, read, valid, cache, slots=p.prompt_tokens,
            project=observing(valid, Reads((START.p,))),
        )  # fmt: skip
        return hidden[0, -1:], cache, {s: jax.vmap(relative)(m) for s, m in seen.items()}

    def states(
        self, params: Params, tokens: jax.Array, theta: Theta, *, teacher: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Final states that predict the scored tokens, quantized and (if asked) unquantized."""
        last, cache, m = self.read_prompt(params, tokens)
        names = list(kernels(params["layers"]))
        numbers = by_projection(theta, names, self.config.n_layers)
        rest = tokens[None, self.protocol.prompt_tokens : -1]

        def read(**how: Any) -> jax.Array:
            valid = jnp.ones(rest.shape, bool)
            after, _, _ = forward(self.config, params, rest, valid, cache, **how)
            return jnp.concatenate([last, after[0]])

        ours = read(project=fake_project(self.grid), per_layer={"theta": numbers, "m": m})
        return ours, read(project=plain) if teacher else ours

    def loss(self, theta: Theta, params: Params, tokens: jax.Array, kind: str) -> jax.Array:
        """Nats per scored token of one window."""
        ours, theirs = self.states(params, tokens, theta, teacher=kind == "kl")
        log_q = jax.nn.log_softmax(logits(self.config, params, ours))
        if kind == "nll":
            scored = tokens[self.protocol.prompt_tokens :, None]
            return -jnp.mean(jnp.take_along_axis(log_q, scored, axis=1))
        log_p = jax.nn.log_softmax(logits(self.config, params, theirs))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))


@partial(jax.jit, static_argnames=("setting", "kind"))
def loss_of(
    theta: Theta, params: Params, tokens: jax.Array, *, setting: Setting, kind: str
) -> jax.Array:
    """`Setting.loss`, compiled."""
    return setting.loss(theta, params, tokens, kind)


@dataclasses.dataclass(frozen=True)
class Training:
    """A descent: one window per step, Adam, the learning rate falling to zero as a cosine."""

    setting: Setting
    kind: str
    steps: int
    rate: float

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(self.rate, self.steps))

    @partial(jax.jit, static_argnums=0)
    def step(
        self, theta: Theta, state: Any, params: Params, tokens: jax.Array
    ) -> tuple[Theta, Any, jax.Array]:
        """θ and the optimizer's state after one window, and the loss before."""
        loss, slope = jax.value_and_grad(self.setting.loss)(theta, params, tokens, self.kind)
        # Adam raises floats to an integer count of steps.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = self.optimizer.update(slope, state)
        theta = optax.apply_updates(theta, updates)
        return theta.replace(clip=jnp.clip(theta.clip, LEAST_CLIP, 1.0)), state, loss


@dataclasses.dataclass
class Checkpoint:
    """An unfinished descent beside its result: arrays in one file, replaced in one step."""

    path: Path

    def save(self, made_for: dict, tree: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("wb") as f:
            np.savez(f, json.dumps(made_for), *jax.tree.leaves(tree))
        part.replace(self.path)

    def load(self, made_for: dict, like: Any) -> Any:
        """What was saved; `like` itself if nothing was."""
        if not self.path.exists():
            return like
        with np.load(self.path) as found:
            settings, *leaves = (found[name] for name in found.files)
        if json.loads(str(settings)) != made_for:
            raise SystemExit(
                f"{self.path} is an unfinished training with other settings; go on with those, or "
                "choose another --out, or remove it"
            )
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def setting_of(args: argparse.Namespace, config: ModelConfig) -> Setting:
    """The setting of a command line.

    Raises:
      SystemExit: a window that leaves nothing to learn from.
    """
    protocol = Protocol(window=args.window, prompt_tokens=args.prompt_tokens)
    if protocol.scored < 2:
        raise SystemExit(
            f"prompt tokens: expected P <= window - 2, got P={protocol.prompt_tokens} and window="
            f"{protocol.window}; the first token after a prompt does not see quantized weights"
        )
    if protocol.window > config.max_positions:
        raise SystemExit(
            f"a window of {protocol.window} tokens does not fit the model's context of "
            f"{config.max_positions}; choose a smaller --window"
        )
    grid = Grid(bits=args.bits, group_size=args.group_size, symmetric=args.symmetric)
    return Setting(config=config, protocol=protocol, grid=grid)


def divided(windows: np.ndarray, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(windows to learn from, windows to watch the loss on), shuffled."""
    if held_out < 1 or len(windows) <= held_out:
        raise SystemExit(
            f"held-out windows: expected at least 1, and fewer than the {len(windows)} windows of "
            f"the text, got {held_out}"
        )
    order = np.random.default_rng(seed).permutation(len(windows))
    return windows[order[held_out:]], windows[order[:held_out]]


def train(args: argparse.Namespace) -> None:
    """Learns θ on one text and writes it with its curve."""
    for what, value in (("steps", args.steps), ("every", args.every)):
        if value < 1:
            raise SystemExit(f"{what}: expected at least 1, got {value}")
    if args.steps % args.every:
        raise SystemExit(
            f"steps: expected a multiple of --every ({args.every}), so that the last θ is watched "
            f"too, got {args.steps}"
        )
    if not args.learning_rate > 0:
        raise SystemExit(f"learning rate: expected a positive number, got {args.learning_rate}")
    model = ttq.load(args.model)
    setting = setting_of(args, model.config)
    corpus, text = corpus_text(args.corpus)
    cut = ttq.cut_windows(model.tokenizer, text, setting.protocol.window)
    learn, watch = divided(cut, args.held_out, args.seed)
    training = Training(setting, args.loss, args.steps, args.learning_rate)
    names = list(kernels(model.params["layers"]))
    start = Learned.read(args.start) if args.start else None
    theta = at_resolution(
        start.theta if start else default_theta(), args.variant, len(names), model.config.n_layers
    )
    made_for = {
        "model": args.model, "variant": args.variant, "corpus": corpus,
        "corpus_sha256": sha256(text), "protocol": protocol_data(setting.protocol),
        "grid": dataclasses.asdict(setting.grid), "loss": args.loss, "optimizer": "adam, cosine",
        "steps": args.steps, "learning_rate": args.learning_rate, "seed": args.seed,
        "windows": len(learn), "held_out_windows": len(watch), "every": args.every,
        "start": start.described if start else "default",
    }  # fmt: skip

    def watched(theta: Theta) -> float:
        score = partial(loss_of, theta, model.params, setting=setting, kind=args.loss)
        return float(np.mean([float(score(jnp.asarray(w))) for w in watch]))

    kept = Checkpoint(args.out.with_suffix(".npz"))
    fresh = {
        "theta": theta, "adam": training.optimizer.init(theta), "step": np.zeros((), int),
        "losses": np.zeros(args.steps), "watched": np.zeros(args.steps // args.every + 1),
        "seconds": np.zeros(()),
    }  # fmt: skip
    now = kept.load(made_for, fresh)
    if now is fresh:
        now["watched"][0] = watched(theta)
    for i in range(int(now["step"]), args.steps):
        began = time.perf_counter()
        window = jnp.asarray(learn[i % len(learn)])
        now["theta"], now["adam"], loss = training.step(
            now["theta"], now["adam"], model.params, window
        )
        now["losses"][i], now["step"] = loss, np.asarray(i + 1)
        if not np.isfinite(now["losses"][i]):
            raise SystemExit(f"the loss is {loss} at step {i}; choose a smaller --learning-rate")
        now["seconds"] = now["seconds"] + (time.perf_counter() - began)
        if (i + 1) % args.every == 0:
            now["watched"][(i + 1) // args.every] = watched(now["theta"])
            kept.save(made_for, now)
            print(
                f"step {i + 1}/{args.steps}: held out "
                f"{now['watched'][(i + 1) // args.every]:.4f} nats, at the start "
                f"{now['watched'][0]:.4f}", file=sys.stderr, flush=True,
            )  # fmt: skip
    theta = now["theta"]
    found = made_for | {
        "theta": {
            "projections": names, "alpha": rounded(theta.alpha),
            "lam": rounded(np.exp(theta.log_lam)), "clip": rounded(theta.clip),
        },
        "training_loss": rounded(now["losses"]),
        "held_out_loss": [[i * args.every, v] for i, v in enumerate(rounded(now["watched"]))],
        "seconds_per_step": round(float(now["seconds"]) / args.steps, 2),
        "device": device(), "versions": versions("optax"),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found) + "\n")
    kept.path.unlink(missing_ok=True)


def rounded(a: Any) -> list:
    """Nested lists of an array, five significant digits."""
    return jax.tree.map(lambda x: float(f"{x:.5g}"), np.asarray(a, np.float64).tolist())


def closed_forms(grid: Grid) -> dict[str, Recipe | None]:
    """What the learned numbers are measured against, on the same grid."""
    ttq_recipe = Recipe(grid=grid)
    with_ = partial(dataclasses.replace, ttq_recipe)
    return {
        "none": None,
        "ttq": ttq_recipe,
        "ttq, clip search": with_(rounding=ClipSearch()),
        "ttq, searched scale": with_(scale=SearchedAlpha()),
        "ttq, second order": with_(rounding=SecondOrder()),
    }


@dataclasses.dataclass(frozen=True)
class Learned:
    """What `train` wrote."""

    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Learned":
        try:
            data = json.loads(path.read_text())
            return cls(data | {"grid": Grid(**data["grid"])})
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
            raise SystemExit(f"{path}: expected a file that train wrote ({e})") from e

    @property
    def name(self) -> str:
        return f"learned on {self.data['corpus']}, {self.data['variant']}"

    @property
    def theta(self) -> Theta:
        found = {k: jnp.asarray(self.data["theta"][k], jnp.float32) for k in _SYMBOLS}
        return Theta(alpha=found["alpha"], log_lam=jnp.log(found["lam"]), clip=found["clip"])

    @property
    def described(self) -> dict[str, Any]:
        """What tells this θ from another, as JSON data."""
        how = {k: self.data[k] for k in ("variant", "corpus", "loss", "steps", "learning_rate")}
        numbers = json.dumps(self.data["theta"], sort_keys=True)
        return {"learned": how, "theta_sha256": hashlib.sha256(numbers.encode()).hexdigest()}


_SYMBOLS = {"alpha": "α", "lam": "λ", "clip": "c"}


def contenders(
    model: ttq.Model, learned: list[Learned], setting: Setting
) -> Iterator[tuple[str, Any, float, Callable[[np.ndarray], float]]]:
    """(name, description, effective bits, nats of a window) of everything that is compared."""
    how = {"config": model.config, "protocol": setting.protocol}
    bits = {}
    for name, recipe in closed_forms(setting.grid).items():
        offline = prepare(model, recipe)
        shapes = decoded_shapes(model.params, model.config, recipe, offline)
        bits[name] = effective_bits(shapes)

        def closed(
            window: np.ndarray, recipe: Recipe | None = recipe, offline: Offline = offline
        ) -> float:
            tokens = jnp.asarray(window)
            return float(score_window(model.params, tokens, offline, recipe=recipe, **how))

        yield name, None if recipe is None else recipe.describe(), bits[name], closed
    for one in learned:
        theta = one.theta

        def ours(window: np.ndarray, theta: Theta = theta) -> float:
            each = loss_of(theta, model.params, jnp.asarray(window), setting=setting, kind="nll")
            return float(each) * setting.protocol.scored

        # θ leaves its trace in scales and zero points alone: as many bits as ttq.
        yield one.name, one.described, bits["ttq"], ours


def score(args: argparse.Namespace) -> None:
    """Scores closed forms and learned numbers on the same windows, one row per text and name."""
    if args.windows < 1:
        raise SystemExit(f"windows: expected at least 1, got {args.windows}")
    learned = [Learned.read(path) for path in args.learned]
    first = learned[0].data
    for one in learned:
        for key in ("model", "grid"):
            if one.data[key] != first[key]:
                raise SystemExit(
                    f"{one.name} has {key} {one.data[key]}, {learned[0].name} has {first[key]}; "
                    "score them apart"
                )
    model = ttq.load(first["model"])
    setting = Setting(
        config=model.config, grid=first["grid"],
        protocol=Protocol(window=args.window, prompt_tokens=args.prompt_tokens),
    )  # fmt: skip
    texts = dict(map(corpus_text, args.corpus))
    windows = {c: ttq.cut_windows(model.tokenizer, t, args.window) for c, t in texts.items()}
    protocol, store = protocol_data(setting.protocol), Results(args.out)
    for name, described, bits, nats in contenders(model, learned, setting):
        for corpus, cut in windows.items():
            at = spread(len(cut), args.windows)
            row = store.read().get((name, corpus), {"nll": []})
            if (row.get("recipe", described), row.get("protocol", protocol)) != (
                described, protocol,
            ):  # fmt: skip
                raise SystemExit(
                    f"{args.out} has {name} on {corpus} by other numbers or another protocol; "
                    "choose another --out"
                )
            missing = cut[at[len(row["nll"]) :]]
            if not len(missing):
                continue
            nll = row["nll"] + [nats(window) for window in missing]
            store.write(store.read() | {(name, corpus): {
                "model": first["model"], "recipe_name": name, "corpus": corpus,
                "corpus_sha256": sha256(texts[corpus]), "protocol": protocol,
                "scored": setting.protocol.scored, "effective_bits": round(bits, 4),
                "recipe": described, "windows": at[: len(nll)], "nll": nll,
                "device": device(), "versions": versions(),
            }})  # fmt: skip
            print(f"{name}, {corpus}: {len(nll)} windows", file=sys.stderr, flush=True)


def report(args: argparse.Namespace) -> None:
    """Prints gap and perplexity by text, then what was learned; draws it."""
    learned = [Learned.read(path) for path in args.learned]
    rows = Results(args.rows).read()
    if not {"none", "ttq"} <= {name for name, _ in rows}:
        raise SystemExit(f"{args.rows}: expected rows that score wrote, none and ttq among them")
    found = gaps(rows)
    corpora, n = list(found["none"]["by_corpus"]), found["none"]["windows"]
    cells = [["", "bits", "mean gap", "over ttq", *corpora]]
    for name, one in found.items():
        means = ["", ""]
        if name != "none":
            means = [interval(one["gap"]), interval(one["gap"] / found["ttq"]["gap"])]
        each = [
            f"{np.exp(np.mean(rows[name, c]['nll'][:n]) / rows[name, c]['scored']):.2f}"
            + ("" if name == "none" else f" ({one['by_corpus'][c]:.3f})")
            for c in corpora
        ]
        cells.append([name, f"{one['bits']:.2f}", *means, *each])
    first = next(iter(rows.values()))
    p = first["protocol"]
    print(
        f"{first['model']}: perplexity (gap), {n} windows of {p['window']} tokens per text, "
        f"{p['kind']}, prompt {p['prompt_tokens']}\n\n{table(cells)}\n"
    )
    for one in learned:
        print(f"{one.name}: {one.data['steps']} steps\n\n{table(numbers_of(one))}\n")
        curve = one.data["held_out_loss"]
        print("held out:", ", ".join(f"{v:.4f} ({at})" for at, v in curve), "\n")
    if args.picture:
        draw(learned, args.picture)


def numbers_of(learned: Learned) -> list[list[str]]:
    """α, λ and c as cells: the value, or mean and range over the layers."""
    theta = learned.data["theta"]
    rows = [["", *_SYMBOLS.values()]]
    for i in range(len(theta["alpha"])):
        name = theta["projections"][i] if len(theta["alpha"]) > 1 else "all"
        values = [np.array(theta[key][i]) for key in _SYMBOLS]
        rows.append([name, *(
            f"{v.mean():.3f}" + (f" [{v.min():.2f}, {v.max():.2f}]" if len(v) > 1 else "")
            for v in values
        )])  # fmt: skip
    return rows


# Okabe & Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")


def draw(learned: list[Learned], path: Path) -> None:
    """A row per learned θ: its α and c by layer, a line per projection; and the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = max(len(v) for one in learned for v in one.data["theta"]["alpha"])
    figure, axes = plt.subplots(
        len(learned), 3, figsize=(13, 3.4 * len(learned)), squeeze=False, sharex="col",
        sharey="col",
    )  # fmt: skip
    for (alphas, clips, losses), one in zip(axes, learned, strict=True):
        theta = one.data["theta"]
        for axis, key in ((alphas, "alpha"), (clips, "clip")):
            axis.axhline(first_value(key), color="#999999", linestyle=":", label="closed form")
            for i, values in enumerate(theta[key]):
                name = theta["projections"][i] if len(theta[key]) > 1 else "all"
                # One number for all layers is a level line across them.
                axis.plot(np.broadcast_to(values, layers), color=_COLOURS[i % len(_COLOURS)],
                          label=name, linewidth=1.3)  # fmt: skip
            axis.set(ylabel=_SYMBOLS[key], xlabel="layer", title=one.name)
        alphas.legend(fontsize=7, ncols=4, loc="upper center")
        alphas.margins(y=0.35)
        losses.plot(one.data["training_loss"], color="#BBBBBB", label="a window each")
        losses.plot(*zip(*one.data["held_out_loss"], strict=True), color="#0072B2", marker="o",
                    label="held out")  # fmt: skip
        losses.set(xlabel="step", ylabel=f"{one.data['loss']}, nats per token")
        losses.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def first_value(key: str) -> float:
    return {"alpha": START.alpha, "lam": START.lam, "clip": 1.0}[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="learn on one text")
    one.add_argument("--model", required=True)
    one.add_argument("--corpus", required=True, metavar="NAME=FILE")
    one.add_argument("--variant", choices=VARIANTS, default="projection",
                     help="one θ for the model, for each kind of projection, or for each "
                     "projection of each layer (default: %(default)s)")  # fmt: skip
    one.add_argument("--start", type=Path, metavar="FILE",
                     help="begin with what was learned at a coarser variant; default: the "
                     "paper's α and λ, whole ranges")  # fmt: skip
    one.add_argument("--loss", choices=LOSSES, default="kl", help="default: %(default)s")
    one.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    one.add_argument("--learning-rate", type=float, default=0.03, help="default: %(default)s")
    one.add_argument("--seed", type=int, default=0, help="of the order of windows")
    one.add_argument("--every", type=int, default=10,
                     help="steps between checkpoints, at which the held-out loss is taken "
                     "(default: %(default)s)")  # fmt: skip
    one.add_argument("--held-out", type=int, default=4, help="windows (default: %(default)s)")
    one.add_argument("--bits", type=int, default=3)
    one.add_argument("--group-size", type=int, default=32)
    one.add_argument("--symmetric", action="store_true")
    one.set_defaults(run=train)
    two = commands.add_parser("score", help="compare with the closed forms, window by window")
    two.add_argument("--learned", type=Path, nargs="+", required=True, metavar="FILE")
    two.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    two.add_argument("--windows", type=int, default=8, help="per text, default: %(default)s")
    two.set_defaults(run=score)
    for command in (one, two):
        command.add_argument("--window", type=int, default=512, help="default: %(default)s")
        command.add_argument("--prompt-tokens", type=int, default=256, help="default: %(default)s")
        command.add_argument("--out", type=Path, required=True)
    three = commands.add_parser("report", help="the table and the picture")
    three.add_argument("rows", type=Path, help="what score wrote")
    three.add_argument("--learned", type=Path, nargs="*", default=[], metavar="FILE")
    three.add_argument("--picture", type=Path)
    three.set_defaults(run=report)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ConfigError, CheckpointError, CorpusError) as e:
        raise SystemExit(str(e)) from e


if __name__ == "__main__":
    main()
