"""What lm-evaluation-harness hands over as arguments, read as the command line's options are."""

import pytest

from ttq_jax.config import ConfigError
from ttq_jax.evaluation.harness_arguments import generation_of, load_arguments, recipe_from
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe_text import save_recipe, with_settings
from ttq_jax.sampling import Sampling


def test_generation_kwargs():
    assert generation_of({}) == ([], 256, Sampling())
    assert generation_of({"until": "x", "max_new_tokens": 5, "do_sample": False,
                          "temperature": 0.7}) == (["x"], 5, Sampling())  # fmt: skip
    assert generation_of({"until": ["x", ""], "temperature": 0.5, "top_k": 3, "top_p": 0.9}) == (
        ["x"], 256, Sampling(temperature=0.5, top_k=3, top_p=0.9)
    )  # fmt: skip
    assert generation_of({"do_sample": True})[2] == Sampling(temperature=1.0)
    for kwargs, message in (
        ({"num_beams": 4}, "got 'num_beams', which ttq does not support"),
        ({"max_gen_toks": 4, "max_tokens": 5}, "one length, got max_gen_toks and max_tokens"),
        ({"max_gen_toks": 0}, "at least 1 token, got 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature above 0"),
        ({"temperature": -1.0}, "temperature >= 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            generation_of(kwargs)


def test_model_arguments_say_what_options_say(tmp_path):
    # As lm_eval reads them: -1 is a float to it, and none may be None.
    arguments = {
        "recipe": "best", "bits": 3, "group_size": -1.0, "symmetric": False,
        "rounding.damping": 0.5, "low_rank.error_rank": 4, "moments.prior": None,
        "moments.prior_tokens": 0.0,
    }  # fmt: skip
    settings = ["rounding.damping=0.5", "low_rank.error_rank=4", "moments.prior=none"]
    settings.append("moments.prior_tokens=0")
    expected = with_settings(preset("best", bits=3, group_size=-1, symmetric=False), settings)
    assert recipe_from(arguments) == ("best", expected)
    arguments = {"recipe": "ttq", "scale": "searched", "rank": 2, "prefill": "quantized"}
    settings = ["scale=searched", "low_rank.rank=2", "prefill=quantized"]
    assert recipe_from(arguments) == ("ttq", with_settings(preset("ttq"), settings))
    save_recipe(tmp_path / "my.toml", expected)
    assert recipe_from({"recipe": str(tmp_path / "my.toml")}) == ("my.toml", expected)
    assert recipe_from({}) == ("fast", preset("fast"))
    assert recipe_from({"recipe": None}) == recipe_from({"recipe": "none"}) == ("none", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fast"}, "expected model=NAME"),
        (
            {"model": "m", "bist": 3},
            r"model_args: expected some of .*got 'bist'; did you mean bits",
        ),
        ({"model": "m", "pretrained": "x"}, "got 'pretrained'"),
        ({"model": "m", "rounding.dampin": 1}, "rounding.dampin: no such key"),
        ({"model": "m", "recipe": "fats"}, "recipe: expected one of none, rtn"),
        (
            {"model": "m", "recipe": "none", "bits": 3},
            "quantizes nothing, so --set grid.bits=3 has no effect",
        ),
        ({"model": "m", "recipe": "awq"}, "recipe awq needs a calibration corpus"),
        ({"model": "no-such-model"}, "no such file or directory"),
        ({"model": "m", "bits": "many"}, "grid.bits: expected an integer"),
    ],
)
def test_bad_model_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_arguments(arguments)
