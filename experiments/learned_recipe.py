"""How far tuning goes: the scale's α and λ and a clipping factor, learned by gradient descent.

Claim     Not far. α, λ and one clipping factor for each projection of each layer, learned on
          WikiText-2, leave 0.928 [0.870, 0.985] of the gap of the closed form (α = 0.5, λ = 0.4,
          whole ranges) at 3 bits; one of each for the whole model ends where it began (α = 0.52,
          λ = 0.43, c = 0.97) and leaves 1.038 [0.982, 1.091]. Recipes without learning do better:
          a clip search in each group leaves 0.747 [0.705, 0.790], second-order rounding 0.592
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
              experiments/results/learned_recipe_smollm2.svg
              experiments/results/learned_recipe_scores.jsonl --learned ${L}_*.json
Cost      SmolLM2-135M: 3.3 s of CPU time per step (windows of 320), 13 to 18 s by the clock on
          the 2 busy cores it was measured on; 2.5 GB. Scoring as in quality.py. A training that was
          cut goes on from its last multiple of --every; rows of scores are kept, more windows are
          added.
Expect    a gap of 0.475 for ttq, 0.493 / 0.465 / 0.441 learned (global, projection, layer), 0.355
          with clip search, 0.281 by second order. The projections want different α: 0.88 for v,
          0.36 to 0.57 for the rest. The gain on WikiText-2 and GSM8K does not appear on PTB and C4.
          The descent is short, and for layers it had not converged: the held-out loss still fell
          when the rate reached zero. At 3 bits the straight-through gradient is not quite that of
          the mean loss. So tuning may reach further than this descent did. 8 windows per text show
          no finer differences.

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
import io
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from learned_scores import Learned, report, score
from quality import corpus_text, protocol_data
from straight_through import LEAST_CLIP, Setting, Theta, at_resolution, default_theta, loss_of

import ttq_jax as ttq
from ttq_jax.checkpoint import CheckpointError
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.evaluation.corpora import CorpusError, sha256
from ttq_jax.evaluation.describe import device, versions
from ttq_jax.evaluation.perplexity import Protocol
from ttq_jax.files import check_destination, write_file
from ttq_jax.quant.grid import Grid
from ttq_jax.types import Params, kernels

VARIANTS = ("global", "projection", "layer")
LOSSES = ("kl", "nll")


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
        data = io.BytesIO()
        np.savez(data, json.dumps(made_for), *jax.tree.leaves(tree))
        write_file(self.path, data.getvalue(), parents=True)

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

    check_destination(args.out, parents=True)
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
    write_file(args.out, json.dumps(found) + "\n", parents=True)
    kept.path.unlink(missing_ok=True)


def rounded(a: Any) -> list:
    """Nested lists of an array, five significant digits."""
    return jax.tree.map(lambda x: float(f"{x:.5g}"), np.asarray(a, np.float64).tolist())


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
