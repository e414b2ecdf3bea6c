"""Learning a recipe: what is differentiated is what is stored, and descent goes where it should."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_params
from tiny_files import write_model

from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.prefill import prefill
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.presets import preset
from ttq_jax.quant.scaling import PowerLaw
from ttq_jax.types import SITE_OF, Offline, Prompts, kernels

pytestmark = pytest.mark.slow
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import learned_recipe  # noqa: E402
import learned_scores  # noqa: E402
import straight_through  # noqa: E402
from learned_recipe import Training  # noqa: E402
from straight_through import Setting, Theta, at_resolution, default_theta  # noqa: E402

CONFIG = small_config()
PARAMS = small_params(CONFIG)
NAMES = list(kernels(PARAMS["layers"]))
WINDOW = jnp.asarray(np.random.default_rng(0).integers(1, 97, 48), jnp.int32)
PROTOCOL = Protocol(window=48, prompt_tokens=20)


def setting(**grid) -> Setting:
    return Setting(config=CONFIG, protocol=PROTOCOL, grid=Grid(**{"bits": 3, **grid}))


def start(variant="layer") -> Theta:
    return at_resolution(default_theta(), variant, len(NAMES), CONFIG.n_layers)


GRIDS = [
    {"store_dtype": "float32"},
    {"store_dtype": "float32", "bits": 4, "group_size": 64, "symmetric": True},
    {"store_dtype": "float32", "bits": 2, "group_size": -1},
]


@pytest.mark.parametrize("grid", GRIDS)
def test_at_the_start_the_weights_are_those_that_ttq_stores(grid):
    one = setting(**grid)
    recipe = preset("ttq", **{"bits": 3, **grid})
    assert recipe == learned_scores.closed_forms(one.grid)["ttq"]
    read = WINDOW[None, : PROTOCOL.prompt_tokens]
    packed = prefill(
        PARAMS, Prompts(read, jnp.ones(read.shape, bool)), empty_cache(CONFIG, 1, 48, jnp.float32),
        config=CONFIG, recipe=recipe, offline=Offline(),
    )[2]  # fmt: skip
    _, _, m = one.read_prompt(PARAMS, WINDOW)
    numbers = straight_through.by_projection(start("global"), NAMES, CONFIG.n_layers)
    for name in NAMES:
        fake = jax.vmap(partial(straight_through.fake_quantized, grid=one.grid))
        got = fake(PARAMS["layers"][name]["kernel"], m[SITE_OF[name]], numbers[name])
        want = dense_weight(packed["layers"][name]["kernel"])
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("other", [{}, {"alpha": 0.8, "lam": 0.1}])
def test_the_loss_is_the_causal_score_of_the_real_quantizer(other, dtype):
    one, rule = setting(store_dtype=dtype), PowerLaw(**other)
    theta = start("projection")
    theta = theta.replace(
        alpha=jnp.full_like(theta.alpha, rule.alpha),
        log_lam=jnp.full_like(theta.log_lam, np.log(rule.lam)),
    )
    recipe = preset("ttq", bits=3, store_dtype=dtype, scale=rule)
    want = score_window(
        PARAMS, WINDOW, Offline(), config=CONFIG, recipe=recipe, protocol=PROTOCOL
    )  # fmt: skip
    got = straight_through.loss_of(theta, PARAMS, WINDOW, setting=one, kind="nll") * PROTOCOL.scored
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_divergence_is_zero_without_quantization_error_and_positive_with_it():
    fine = straight_through.loss_of(start(), PARAMS, WINDOW, setting=setting(bits=8), kind="kl")
    coarse = straight_through.loss_of(start(), PARAMS, WINDOW, setting=setting(), kind="kl")
    assert 0 <= fine < 0.01 * coarse


@pytest.mark.parametrize(("kind", "symmetric"), [("kl", False), ("nll", True)])
def test_without_rounding_the_gradient_is_a_finite_difference(kind, symmetric, monkeypatch):
    def unrounded(groups, scales, zeros, grid):
        return jnp.clip(groups / scales[:, None] + zeros[:, None], 0, 2.0**grid.bits - 1)

    monkeypatch.setattr(straight_through, "encode", unrounded)
    one = setting(store_dtype="float32", symmetric=symmetric)
    # What is clipped makes the loss depend on α and λ without any rounding.
    theta = start().replace(clip=jnp.full((len(NAMES), CONFIG.n_layers), 0.6))
    # Where weights begin to be clipped the loss has a kink: this model has few between two points.
    params = small_params(CONFIG, seed=3)
    value_and_slope = jax.jit(jax.value_and_grad(lambda t: one.loss(t, params, WINDOW, kind)))
    slope = value_and_slope(theta)[1]
    for field in ("alpha", "log_lam", "clip"):
        value, moved = getattr(theta, field), getattr(slope, field)
        size = jnp.linalg.norm(moved)
        step = 0.003 * moved / size
        at = [value_and_slope(theta.replace(**{field: value + s * step}))[0] for s in (1, -1)]
        np.testing.assert_allclose(size, (at[0] - at[1]) / 0.006, rtol=0.05, err_msg=field)


STRETCHES = {"alpha": (0.6, 1.0), "log_lam": (-3.0, -1.0), "clip": (0.4, 0.55)}


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_straight_through_gradient_is_that_of_the_mean_error(symmetric):
    # Over many weights the jumps of rounding average out: the straight-through derivative of the
    # activation-weighted error, averaged over a stretch, is its difference over that stretch.
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(256, 512)), jnp.float32)
    m = jnp.asarray(np.exp(rng.normal(size=256)), jnp.float32)
    m = m / m.mean()
    grid = Grid(bits=5, symmetric=symmetric, store_dtype="float32")

    @jax.jit
    @jax.value_and_grad
    def error(theta, w, m):
        fake = straight_through.fake_quantized(w, m, theta, grid)
        return jnp.mean(jnp.square(m)[:, None] * jnp.square(w - fake))

    base = Theta(alpha=jnp.float32(0.5), log_lam=jnp.log(0.4), clip=jnp.float32(0.9))
    for field, (low, high) in STRETCHES.items():
        at = lambda value, field=field: error(base.replace(**{field: value}), w, m)  # noqa: E731
        ends = jnp.linspace(low, high, 11)
        slopes = [getattr(at(x)[1], field) for x in (ends[1:] + ends[:-1]) / 2]
        change = at(ends[-1])[0] - at(ends[0])[0]
        assert abs(change) > 0.02 * at(ends[0])[0]
        want = float(np.mean(slopes) * (high - low))
        np.testing.assert_allclose(want, change, rtol=0.1, err_msg=field)


def with_dead_outliers(params, grid):
    """Large weights in every group of a few projections, on channels that are always zero.

    Nothing reads them, but they take most of each group's range: the more, the smaller α is, which
    is what shrinks a channel that no token excites.
    """
    dead = np.arange(0, CONFIG.d_model, grid.group_size)
    layers = dict(params["layers"])
    for norm in ("attn_norm", "mlp_norm"):
        layers[norm] = {"scale": layers[norm]["scale"].at[:, dead].set(0.0)}
    signs = jnp.asarray([1.0, -1.0])[:, None]
    for name in SUFFER:
        kernel = layers[name]["kernel"]
        layers[name] = {"kernel": kernel.at[:, dead].set(12.0 * jnp.std(kernel) * signs)}
    return {**params, "layers": layers}


SUFFER = ("q", "gate", "up")


def test_descent_finds_an_optimum_that_was_put_there():
    one = setting(bits=4, store_dtype="float32")
    params = with_dead_outliers(PARAMS, one.grid)
    training = Training(one, "kl", 25, 0.05)
    theta = start("projection")
    state = training.optimizer.init(theta)
    rng = np.random.default_rng(2)
    windows = jnp.asarray(rng.integers(1, 97, (25, 48)), jnp.int32)
    watch = jnp.asarray(rng.integers(1, 97, (16, 48)), jnp.int32)

    def watched(theta):
        return np.mean([
            straight_through.loss_of(theta, params, w, setting=one, kind="kl") for w in watch
        ])  # fmt: skip

    before = watched(theta)
    for window in windows:
        theta, state, _ = training.step(theta, state, params, window)
    assert watched(theta) < 0.8 * before
    alpha = dict(zip(NAMES, np.asarray(theta.alpha)[:, 0], strict=True))
    assert min(alpha[n] for n in SUFFER) > 0.1 + max(alpha[n] for n in ("k", "v", "o", "down"))
    assert jnp.all((theta.clip > 0) & (theta.clip <= 1))


@pytest.fixture
def tiny(tmp_path):
    """A model's directory and a text, by what they are called on the command line."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: {i * i}.\n" for i in range(90)))
    return SimpleNamespace(
        model=str(write_model(tmp_path / "model")), corpus=f"squares={text}", folder=tmp_path
    )


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["learned_recipe.py", *map(str, argv)])
    learned_recipe.main()


def train(monkeypatch, tiny, name, *more):
    out = tiny.folder / f"{name}.json"
    run(monkeypatch, "train", "--model", tiny.model, "--corpus", tiny.corpus, "--window", 48,
        "--prompt-tokens", 24, "--steps", 6, "--every", 2, "--held-out", 2, "--out", out,
        *more)  # fmt: skip
    return out


def counted(monkeypatch, limit=None):
    """The list that grows by one at every step; a training is killed in step number `limit`."""
    real, done = Training.step, []

    def step(self, *args):
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, *args)

    monkeypatch.setattr(Training, "step", step)
    return done


def test_a_killed_training_goes_on_to_the_same_numbers(tiny, monkeypatch):
    whole = json.loads(train(monkeypatch, tiny, "whole", "--variant", "layer").read_text())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, limit=5)
        train(patch, tiny, "cut", "--variant", "layer")
    assert not (tiny.folder / "cut.json").exists()
    with pytest.raises(SystemExit, match="unfinished training with other settings"):
        train(monkeypatch, tiny, "cut", "--variant", "layer", "--seed", "1")
    done = counted(monkeypatch)
    resumed = json.loads(train(monkeypatch, tiny, "cut", "--variant", "layer").read_text())
    assert len(done) == 2, "four of six steps were kept"
    for key in ("theta", "training_loss", "held_out_loss"):
        assert resumed[key] == whole[key]
    assert np.shape(whole["theta"]["alpha"]) == (7, 2)
    assert np.ptp(whole["theta"]["alpha"]) > 0
    assert [at for at, _ in whole["held_out_loss"]] == [0, 2, 4, 6]
    assert not list(tiny.folder.glob("*.npz"))


def test_a_finer_variant_starts_where_a_coarser_one_ended(tiny, monkeypatch):
    coarse = train(monkeypatch, tiny, "coarse", "--variant", "global")
    fine = train(monkeypatch, tiny, "fine", "--variant", "layer", "--start", coarse)
    found = [json.loads(file.read_text()) for file in (coarse, fine)]
    np.testing.assert_allclose(
        found[0]["held_out_loss"][-1][1], found[1]["held_out_loss"][0][1], rtol=1e-3
    )
    assert found[1]["start"]["learned"]["variant"] == "global"
    with pytest.raises(SystemExit, match="start from a coarser variant"):
        train(monkeypatch, tiny, "back", "--variant", "global", "--start", fine)


def test_from_training_to_the_picture(tiny, monkeypatch, capsys):
    some = {name: learned_scores.closed_forms(Grid(bits=3))[name] for name in ("none", "ttq")}
    monkeypatch.setattr(learned_scores, "closed_forms", lambda grid: some)
    files = [train(monkeypatch, tiny, "layer", "--variant", "layer")]
    rows, picture = tiny.folder / "rows.jsonl", tiny.folder / "picture.svg"

    def score(windows, protocol=("--window", 48, "--prompt-tokens", 24)):
        run(monkeypatch, "score", "--learned", *files, "--corpus", tiny.corpus, "--windows",
            windows, *protocol, "--out", rows)  # fmt: skip

    score(2)
    first = learned_scores.Results(rows).read()
    score(3)
    again = learned_scores.Results(rows).read()
    for key, row in first.items():
        assert again[key]["nll"][:2] == row["nll"]
        assert len(again[key]["nll"]) == 3
    bits = {name: row["effective_bits"] for (name, _), row in again.items()}
    assert bits["learned on squares, layer"] == bits["ttq"] < bits["none"]
    with pytest.raises(SystemExit, match="by other numbers or another protocol"):
        score(3, ("--window", 40, "--prompt-tokens", 24))
    capsys.readouterr()
    run(monkeypatch, "report", rows, "--learned", *files, "--picture", picture)
    out = capsys.readouterr().out
    assert "3 windows of 48 tokens per text, causal, prompt 24" in out
    shown = np.exp(np.mean(again["ttq", "squares"]["nll"]) / 24)
    assert f"{shown:.2f} (" in next(x for x in out.splitlines() if x.startswith("ttq "))
    assert picture.read_text().count("<path") > 50
    assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert "text.txt" not in files[0].read_text() + rows.read_text()


def test_the_learned_score_is_of_the_learned_numbers(tiny, monkeypatch):
    file = train(monkeypatch, tiny, "one", "--variant", "global", "--learning-rate", "0.1")
    learned = learned_scores.Learned.read(file)
    rule = PowerLaw(alpha=float(learned.theta.alpha[0, 0]),
                    lam=float(np.exp(learned.theta.log_lam[0, 0])))  # fmt: skip
    assert abs(rule.alpha - 0.5) > 0.05
    model = learned_scores.ttq.load(tiny.model)
    protocol = Protocol(window=48, prompt_tokens=24)
    one = Setting(config=model.config, protocol=protocol, grid=learned.data["grid"])
    whole = dataclasses.replace(
        learned, data=learned.data | {"theta": learned.data["theta"] | {"clip": [[1.0]]}}
    )
    *_, (name, _, _, nats) = learned_scores.contenders(model, [whole], one)
    assert name == whole.name
    window = np.arange(48, dtype=np.int32)
    want = score_window(
        model.params, jnp.asarray(window), Offline(), config=model.config, protocol=protocol,
        recipe=preset("ttq", bits=3, scale=rule),
    )  # fmt: skip
    np.testing.assert_allclose(nats(window), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt-tokens", "47"), r"P <= window - 2, got P=47 and window=48"),
        (("--prompt-tokens", "48"), r"1 <= P < window, got P=48"),
        (("--window", "300"), "context of 256"),
        (("--steps", "0"), "steps: expected at least 1, got 0"),
        (("--steps", "5"), "a multiple of --every \\(2\\)"),
        (("--every", "0"), "every: expected at least 1, got 0"),
        (("--learning-rate", "0"), "positive number, got 0"),
        (("--held-out", "1000"), r"fewer than the \d+ windows of the text, got 1000"),
        (("--bits", "7"), "bits: expected one of 2, 3, 4, 5, 8, got 7"),
        (("--model", "nowhere.gguf"), "nowhere.gguf"),
        (("--corpus", "x=nowhere.txt"), "no such file"),
    ],
)
def test_bad_input_to_training(options, message, tiny, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        train(monkeypatch, tiny, "bad", *options)
    assert not (tiny.folder / "bad.json").exists()


def test_bad_input_to_scoring_and_reporting(tiny, monkeypatch):
    good = train(monkeypatch, tiny, "good", "--variant", "global")
    other = train(monkeypatch, tiny, "other", "--variant", "global", "--bits", "4")
    wrong = tiny.folder / "wrong.json"
    wrong.write_text("{}")

    def score(*files, **more):
        options = [x for k, v in more.items() for x in (f"--{k}", v)]
        run(monkeypatch, "score", "--learned", *files, "--corpus", tiny.corpus, "--out",
            tiny.folder / "rows.jsonl", *options)  # fmt: skip

    with pytest.raises(SystemExit, match="expected a file that train wrote"):
        score(wrong)
    with pytest.raises(SystemExit, match="score them apart"):
        score(good, other)
    with pytest.raises(SystemExit, match="windows: expected at least 1, got 0"):
        score(good, windows=0)
    with pytest.raises(SystemExit, match="expected rows that score wrote, none and ttq among them"):
        run(monkeypatch, "report", tiny.folder / "none.jsonl")
