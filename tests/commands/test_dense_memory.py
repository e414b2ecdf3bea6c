"""`--dense-memory host`, wherever a model is loaded."""

import pytest
from test_ignore_key import options_of

from ttq_jax.config import ConfigError
from ttq_jax.evaluation import preparation
from ttq_jax.evaluation.harness_arguments import load_arguments
from ttq_jax.evaluation.preparation import load
from ttq_jax.sweeps.axes import make_cell
from ttq_jax.sweeps.run import Runner
from ttq_jax.types import kernels


def memories(model):
    return {stack.sharding.memory_kind for stack in kernels(model.params["layers"]).values()}


def test_every_command_that_loads_a_model_takes_it():
    for name, options in options_of().items():
        loads = "--model" in options and name != "kernels"
        assert ("--dense-memory" in options) == loads, name


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "abc", "--max-new-tokens", "2"],
        ["perplexity", "--corpus", "builtin:prose", "--window", "16", "--prompt-tokens", "8",
         "--max-windows", "1"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_results_are_the_same(words, cli, tiny, monkeypatch):
    seen = []

    def watched(*args, **how):
        seen.append(load(*args, **how))
        return seen[-1]

    monkeypatch.setattr(preparation, "load", watched)
    words += ["--model", tiny, "--recipe", "rtn", "--quiet", "--no-compilation-cache"]
    (code, plain, _), (_, streamed, _) = cli(*words), cli(*words, "--dense-memory", "host")
    assert code == 0
    assert plain.partition("time ")[0] == streamed.partition("time ")[0]
    assert [*map(memories, seen)] == [{"device"}, {"pinned_host"}]


def test_a_sweep_and_the_harness_have_it(tiny):
    values = {"model": tiny, "corpus": "builtin:prose", "recipe": "none", "dense_memory": "host"}
    cell = make_cell(values)
    assert cell.values["dense_memory"] == "host"
    options = cell.options
    made = Runner()._load(options.model, options.dtype, options.ignore_key, options.dense_memory)
    assert memories(made) == {"pinned_host"}
    with pytest.raises(ConfigError, match="dense_memory: expected one of device, host, got 'disk'"):
        make_cell(values | {"dense_memory": "disk"})
    given = {"model": tiny, "recipe": "none", "dense_memory": "host"}
    assert memories(load_arguments(given)["model"]) == {"pinned_host"}
