"""What the tests of the harness adapter ask, and what the answers are checked against."""

import jax.numpy as jnp

from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.offline.calibrate import prepare
from ttq_jax.quant.head import joined
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe_text import with_settings

# Most of a test's time compiles packed products: two projections are enough to tell weights apart.
SOME = "layers/(v|down)"
RECIPES = {
    "none": None,
    "rtn": preset("rtn", bits=3, select=SOME),
    "paper": preset("paper", bits=3, select=SOME),
    "fast": preset("fast", bits=3, select=SOME),
    "refresh": with_settings(preset("ttq", bits=3, select=SOME), ["moments.refresh=5"]),
}
# Tokens are bytes. Lengths repeat, so that programs do: prompts of 20, continuations of 8.
TOWN = "The capital of Paris"
PAIRS = [
    (TOWN, " is what"),
    (TOWN, " is near"),
    ("Two and two make up ", "4, or so"),
    (TOWN, "? I ask!"),
    ("", "A text from nowhere"),
    ("A context that ends in spaces  ", "and goes on"),
]


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def scores(adapter, *pairs):
    return adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def answers(adapter, *arguments):
    return adapter.generate_until(requests("generate_until", *arguments), disable_tqdm=True)


def causal(model, recipe, prompt, continuation):
    """The log-likelihood by the project's own perplexity."""
    tokens = jnp.asarray([*prompt, *continuation], jnp.int32)
    protocol = Protocol(window=len(tokens), prompt_tokens=len(prompt))
    params, offline = joined(model.params, recipe, prepare(model, recipe))
    how = {"config": model.config, "recipe": recipe, "protocol": protocol}
    return -float(score_window(params, tokens, offline, **how))
