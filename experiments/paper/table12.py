"""Table 12: a vision-language model's answers about images, its weights made by each of them.

Claim     TextVQA, Qwen3-VL: TTQ keeps its accuracy at 2 bits, where AWQ's falls below 1 %.
Command   python experiments/paper/table12.py --data TEXTVQA --model PRESET --out FILE
          TEXTVQA is a directory with TextVQA_0.5.1_val.json and train_images/, as on textvqa.org;
          PRESET a PaliGemma in keras-hub's format, such as pali_gemma2_mix_3b_448, as a directory.
Cost      Needs `pip install keras-hub pillow`. Three billion weights in float32 take 12 GB, and as
          much again while they are rounded: an accelerator. Not run yet, for want of the weights.
Expect    no number of ours yet. The model is PaliGemma, for no library that we know has Qwen3-VL in
          JAX (November 2026): compare the order of the methods, not the paper's percentages.

An image and a question are the prompt. Their activations make the weights of the vision tower and
of the text decoder, and the answer is decoded from those. RTN reads nothing. AWQ's moments are of
other images and questions, the last of the data set, which are not asked.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import ttq_jax as ttq
from ttq_jax.errors import Error
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.functions import effective_bits

QUESTIONS = "TextVQA_0.5.1_val.json"
METHODS = ("none", "rtn", "awq", "ttq")

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how's i'd i'm i've isn't it'd it'll let's might've mightn't must've mustn't needn't shan't she'd
she's should've shouldn't somebody's someone's something's that'd that's there'd there's they'd
they'll they're they've wasn't we've weren't what'll what's when's where'd where's who'd who's
who've why's won't would've wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the data set.

    Attributes:
      text: what is asked.
      image: a file.
      answers: of ten people.
    """

    text: str
    image: Path
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A vision-language model.

    Attributes:
      fn: (params, tokens[1, T], image or None, cache, at) -> (scores[1, V] of the next token,
        cache); with an image its patches come before the tokens.
      params: of `fn`.
      tokens: a question's, int32[T].
      image: a file's pixels, [1, …].
      cache: an empty one for an image and this many tokens.
      patches: of an image.
      text: of an answer's tokens.
      end: the token that ends an answer.
    """

    fn: Callable[..., Any]
    params: Any
    tokens: Callable[[str], np.ndarray]
    image: Callable[[Path], jax.Array]
    cache: Callable[[int], jax.Array]
    patches: int
    text: Callable[[Sequence[int]], str]
    end: int


def read_questions(directory: Path) -> list[Question]:
    """The questions of a directory in TextVQA's layout.

    Raises:
      Error: there are none, or images are missing.
    """
    path = directory / QUESTIONS
    if not path.is_file():
        raise Error(
            f"--data {directory}: expected {QUESTIONS} and train_images/ in it, found none; get "
            "both from https://textvqa.org/dataset"
        )
    rows = json.loads(path.read_text())["data"]
    found = [
        Question(row["question"], directory / "train_images" / f"{row['image_id']}.jpg",
                 tuple(row["answers"]))
        for row in rows
    ]  # fmt: skip
    missing = [one.image for one in found if not one.image.is_file()]
    if missing or not found:
        raise Error(
            f"--data {directory}: expected an image for each of {len(found)} questions, "
            f"{len(missing)} are missing, such as {missing[:1]}; unpack train_val_images.zip there"
        )
    return found


def normal_form(answer: str) -> str:
    """An answer as VQA compares it (visualqa.org/evaluation.html).

    In lower case, without articles and punctuation, numbers as digits, contractions with their
    apostrophe. A period stays within a number, a comma within one is dropped.
    """
    words = answer.lower().replace("\n", " ").replace("\t", " ").strip()
    words = re.sub(r"(?<=\d),(?=\d)", "", words)
    words = re.sub(r"(?<!\d)\.|\.(?!\d)", "", words)
    words = re.sub(r"[^\w\s'.:]|_", " ", words)
    kept = [_DIGITS.get(word, word) for word in words.split() if word not in {"a", "an", "the"}]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy in [0, 1]: of each nine of ten people, three who say the same are enough.

    Args:
      answer: the model's.
      people: the answers of ten.

    Returns:
      The mean over the ten choices of nine of min(1, matches / 3).
    """
    same = [normal_form(one) == normal_form(answer) for one in people]
    return float(np.mean([min(1.0, (sum(same) - one) / 3) for one in same]))


def answering(model: Model, recipe: ttq.Recipe | None, limit: int) -> Callable[..., Any]:
    """The program that answers: (params, packed or None, tokens, image, cache) -> tokens[limit].

    Args:
      model: the model.
      recipe: None for the model as it is.
      limit: most tokens of an answer.

    Returns:
      One jitted function; the image and the question are read with `params`, and without `packed`
      they make the weights.
    """

    @jax.jit
    def program(params: Any, packed: Any, tokens: Any, image: Any, cache: Any) -> jax.Array:
        start = jnp.int32(model.patches + tokens.shape[1])
        if recipe is None:
            packed, step = params, model.fn
        else:
            step = ttq.run(model.fn)
        if packed is None:
            read = ttq.read(model.fn, recipe)
            (scores, cache), packed = read(params, tokens, image, cache, 0)
        else:
            scores, cache = model.fn(params, tokens, image, cache, 0)

        def one(carry: Any, i: jax.Array) -> Any:
            scores, cache = carry
            token = jnp.argmax(scores, -1).astype(jnp.int32)
            return step(packed, token[:, None], None, cache, start + i), token[0]

        return jax.lax.scan(one, (scores, cache), jnp.arange(limit, dtype=jnp.int32))[1]

    return program


def inputs(model: Model, question: Question, limit: int) -> tuple[Any, Any, Any]:
    """(tokens, image, cache) of a question."""
    tokens = jnp.asarray(model.tokens(question.text), jnp.int32)[None]
    return tokens, model.image(question.image), model.cache(tokens.shape[1] + limit)


def scored(
    model: Model, method: str, bits: int, asked: list[Question], others: list[Question], limit: int
) -> dict[str, Any]:
    """One row of the table.

    Args:
      model: the model.
      method: of METHODS.
      bits: of a code; the model as it is has none.
      asked: what is asked.
      others: what AWQ is calibrated on.
      limit: most tokens of an answer.

    Returns:
      The mean accuracy in percent, stored bits per packed weight, and the answers.
    """
    recipe = None if method == "none" else ttq.preset(method, bits=bits, head=None)
    packed = None
    if method == "awq":
        observe = jax.jit(lambda params, *args: ttq.observe(model.fn, recipe)(params, *args, 0)[1])
        seen = [observe(model.params, *inputs(model, one, limit)) for one in others]
        observed = functools.reduce(operator.add, seen)
        packed = jax.jit(lambda params, seen: ttq.quantize(params, seen, recipe))(
            model.params, observed
        )
    program, answers = answering(model, recipe, limit), []
    for one in asked:
        tokens = program(model.params, packed, *inputs(model, one, limit)).tolist()
        end = tokens.index(model.end) if model.end in tokens else limit
        answers.append(model.text(tokens[:end]))
    stored = None
    if recipe is not None:
        if packed is None:
            read = ttq.read(model.fn, recipe)
            packed = jax.eval_shape(read, model.params, *inputs(model, asked[0], limit), 0)[1]
        stored = round(effective_bits(packed), 3)
    right = [accuracy(a, one.answers) for a, one in zip(answers, asked, strict=True)]
    return {
        "method": method, "bits": None if recipe is None else bits, "effective_bits": stored,
        "questions": len(asked), "accuracy": round(100 * float(np.mean(right)), 2),
        "answers": answers,
    }  # fmt: skip


def pali_gemma(preset: Path) -> Model:
    """A PaliGemma of keras-hub from its directory.

    Raises:
      Error: keras-hub or the weights are missing.
    """
    if importlib.util.find_spec("keras_hub") is None:
        raise Error("table12: expected keras-hub, found none; pip install keras-hub pillow")
    if not (preset / "config.json").is_file():
        raise Error(
            f"--model {preset}: expected a PaliGemma preset of keras-hub with its weights, found "
            "no config.json; download one, such as keras/paligemma2 of Kaggle, and pass its "
            "directory"
        )
    import keras
    import keras_hub

    model = keras_hub.models.PaliGemmaCausalLM.from_preset(str(preset))
    backbone, reader = model.backbone, model.preprocessor
    patches, tokenizer = backbone.image_sequence_length, reader.tokenizer

    def fn(params: Any, tokens: Any, image: Any, cache: Any, at: Any) -> Any:
        with keras.StatelessScope([(v, params[v.path]) for v in model.trainable_variables]):
            seen, real = None, None
            if image is not None:
                seen, place = backbone.vit_encoder(image), jnp.arange(cache.shape[3] - patches)
                real = (place < tokens.shape[1])[None].astype(jnp.int32)
            scores, _, cache = model.call_with_cache(tokens, cache, at, seen, real)
        return scores[:, -1], cache

    def image(path: Path) -> jax.Array:
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        return jnp.asarray(reader.image_converter(pixels))

    def tokens(text: str) -> np.ndarray:
        words = np.asarray(tokenizer(f"answer en {text}\n"))
        return np.concatenate([[tokenizer.start_token_id], words]).astype(np.int32)

    def cache(slots: int) -> jax.Array:
        heads = (backbone.num_key_value_heads, backbone.head_dim)
        return jnp.zeros((1, backbone.num_layers, 2, patches + slots, *heads))

    params = {v.path: v.value for v in model.trainable_variables}
    text = lambda ids: str(tokenizer.detokenize(list(ids))) if ids else ""  # noqa: E731
    return Model(fn, params, tokens, image, cache, patches, text, tokenizer.end_token_id)


def table(
    model: Model, questions: list[Question], bits: Sequence[int], calibration: int, limit: int
) -> list[dict[str, Any]]:
    """All rows; the last `calibration` questions are AWQ's and are not asked.

    Raises:
      Error: no question is left to be asked.
    """
    asked, others = questions[:-calibration], questions[-calibration:]
    if not asked:
        raise Error(
            f"--calibration: expected fewer than the {len(questions)} questions there are, got "
            f"{calibration}; the others are asked"
        )
    rows = []
    for method, width in [("none", 0), *((m, b) for b in bits for m in METHODS[1:])]:
        rows.append(scored(model, method, width, asked, others, limit))
        print({k: v for k, v in rows[-1].items() if k != "answers"}, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a directory in TextVQA's layout")
    parser.add_argument("--model", type=Path, required=True, help="a PaliGemma preset's directory")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--max-questions", type=int, help="how many are asked; all by default")
    parser.add_argument("--calibration", type=int, default=32, help="questions AWQ reads, >= 1")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    try:
        if args.out:
            check_destination(args.out)
        questions = read_questions(args.data)
        model = pali_gemma(args.model)
        if args.max_questions:
            questions = [*questions[: args.max_questions], *questions[-args.calibration :]]
        rows = table(model, questions, args.bits, args.calibration, args.max_new_tokens)
    except Error as error:
        sys.exit(f"error: {error}")
    found = {"command": " ".join(["python", *sys.argv]), "versions": versions(), "rows": rows}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out:
        write_file(args.out, text)


if __name__ == "__main__":
    main()
