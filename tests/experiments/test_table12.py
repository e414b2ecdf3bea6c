"""Table 12's path from images and questions to accuracies, with a tiny random model."""

import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ttq_jax as ttq
from ttq_jax.errors import Error
from ttq_jax.functions import dense_tree, is_packed

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "paper"))
import table12

LETTERS = "abcdefghijklmnopqrstuvwxyz ?"
WIDTH, PATCHES = 32, 4


class Seeing(nn.Module):
    """Patches of an image, then letters; each looks at the cached ones before it."""

    @nn.compact
    def __call__(self, tokens, image, cache, at):
        x = nn.Embed(len(LETTERS) + 1, WIDTH, name="embed")(tokens)
        patches = nn.Dense(WIDTH, name="patches")
        if image is not None:
            seen = nn.Dense(WIDTH, name="tower")(nn.tanh(patches(image)))
            x = jnp.concatenate([seen, x], axis=1)
        rows = jnp.asarray(at, jnp.int32) + jnp.arange(x.shape[1], dtype=jnp.int32)
        h = nn.LayerNorm(name="norm")(x)
        q, k, v = (nn.Dense(WIDTH, name=name)(h) for name in "qkv")
        cache = cache.at[:, :, rows].set(jnp.stack([k, v]))
        scores = jnp.where(
            jnp.arange(cache.shape[2])[None] <= rows[:, None], q @ cache[0].swapaxes(1, 2), -jnp.inf
        )
        x = x + nn.Dense(WIDTH, name="o")(jax.nn.softmax(scores, -1) @ cache[1])
        x = x + nn.Dense(WIDTH, name="down")(nn.silu(nn.Dense(48, name="up")(x)))
        return nn.Dense(len(LETTERS) + 1, name="head")(x[:, -1]), cache


def pixels(path):
    image = np.asarray(Image.open(path).convert("RGB").resize((8, 8)), np.float32) / 255
    return jnp.asarray(image.reshape(2, 4, 2, 4, 3).swapaxes(1, 2).reshape(1, PATCHES, -1))


@pytest.fixture(scope="module")
def model():
    module, cache = Seeing(), lambda slots: jnp.zeros((2, 1, PATCHES + slots, WIDTH))
    tokens, image = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, PATCHES, 48))
    return table12.Model(
        fn=module.apply,
        params=jax.jit(module.init, static_argnums=4)(
            jax.random.key(0), tokens, image, cache(3), 0
        ),
        tokens=lambda text: np.array([LETTERS.index(c) for c in text.lower()], np.int32),
        image=pixels,
        cache=cache,
        patches=PATCHES,
        text=lambda ids: "".join(LETTERS[i] for i in ids),
        end=len(LETTERS),
    )


@pytest.fixture
def data(tmp_path):
    """Two questions to ask and one to calibrate on, in TextVQA's layout."""
    rows, rng = [], np.random.default_rng(0)
    (tmp_path / "train_images").mkdir()
    for i, text in enumerate(("what is it?", "who is this", "is this red")):
        picture = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))
        picture.save(tmp_path / "train_images" / f"{i}.jpg")
        rows.append({"question": text, "image_id": str(i), "answers": ["red"] * 10})
    (tmp_path / table12.QUESTIONS).write_text(json.dumps({"data": rows}))
    return tmp_path


def test_two_questions_by_every_method(model, data):
    rows = table12.table(model, table12.read_questions(data), [4], calibration=1, limit=5)
    assert [row["method"] for row in rows] == list(table12.METHODS)
    assert all(row["questions"] == len(row["answers"]) == 2 for row in rows)
    assert all(row["accuracy"] == 0 for row in rows)
    bits = [row["effective_bits"] for row in rows]
    assert bits[0] is None
    assert 4 < bits[1] < bits[2] == bits[3] < 7  # D is stored too
    # Whoever says what the model says makes it right.
    asked = [
        dataclasses.replace(one, answers=(answer,) * 10)
        for one, answer in zip(table12.read_questions(data), rows[0]["answers"], strict=False)
    ]
    assert table12.scored(model, "none", 0, asked, [], 5)["accuracy"] == 100


def test_an_image_and_a_question_make_the_weights_that_answer(model, data):
    """Greedy tokens are those of the same code over the dense weights that the packed stand for."""
    recipe, (one, other, _) = (
        ttq.preset("ttq", bits=3, head=None),
        table12.read_questions(data),
    )
    args = table12.inputs(model, one, 5)
    tokens = table12.answering(model, recipe, 5)(model.params, None, *args)
    packed = jax.jit(ttq.read(model.fn, recipe))(model.params, *args, 0)[1]
    paths = {k for k, leaf in packed["params"].items() if is_packed(leaf.get("kernel"))}
    assert paths == {"patches", "tower", *"qkvo", "up", "down"}
    rounded, plain = dense_tree(model.params, packed), jax.jit(model.fn)
    scores, cache = plain(model.params, *args, 0)
    for i, token in enumerate(tokens):
        assert int(jnp.argmax(scores[0])) == int(token)
        start = PATCHES + args[0].shape[1] + i
        scores, cache = plain(rounded, token[None, None], None, cache, start)
    others = table12.inputs(model, other, 5)
    elsewhere = jax.jit(ttq.read(model.fn, recipe))(model.params, *others, 0)[1]
    scale = lambda tree: tree["params"]["tower"]["kernel"].views[0].channel_scale  # noqa: E731
    assert not np.array_equal(*(np.asarray(scale(t), np.float32) for t in (packed, elsewhere)))


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The  Red car.", "red car"), ("1,000", "1000"), ("3.5", "3.5"), ("two", "2"),
        ("dont stop!", "don't stop"), ("a.m.", "am"), ("12:30", "12:30"), ("yes/no", "yes no"),
    ],
)  # fmt: skip
def test_the_form_in_which_answers_are_compared(answer, same):
    assert table12.normal_form(answer) == same


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_accuracy_is_of_nine_of_ten_people(matches, wanted):
    people = ["a stop sign"] * matches + ["other"] * (10 - matches)
    assert table12.accuracy("Stop sign.", people) == pytest.approx(wanted)


def test_what_is_missing_is_said_in_one_line(tmp_path, data, model):
    with pytest.raises(Error, match=r"expected TextVQA_0.5.1_val.json .*//textvqa.org/dataset$"):
        table12.read_questions(tmp_path / "nowhere")
    with pytest.raises(Error, match="fewer than the 3 questions"):
        table12.table(model, table12.read_questions(data), [4], calibration=3, limit=5)
    (data / "train_images" / "1.jpg").unlink()
    with pytest.raises(Error, match=r"each of 3 questions, 1 are missing.*1\.jpg"):
        table12.read_questions(data)
    with pytest.raises(Error, match=r"keras-hub"):
        table12.pali_gemma(tmp_path / "no_weights")
