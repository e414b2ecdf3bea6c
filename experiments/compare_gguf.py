"""llama.cpp's quantizers beside this package's: the same weights, windows, protocol and bits.

Claim     with an importance matrix from C4, llama.cpp's 4-bit formats leave less of the gap than
          `fast` at as many bits.
Command   pip install llama-cpp-python
          python experiments/compare_gguf.py --model smollm2 --corpus wikitext2=FILE …
              --calibration c4=FILE --format Q4_K --format IQ4_XS@c4 --format Q3_K@prompt …
              --windows 16 --out experiments/results/frontier_smollm2.jsonl
Cost      llama-cpp-python is compiled when it is installed, 5 minutes. SmolLM2, per window: 2 s to
          score and, with @prompt, 5 to 60 s to quantize; the IQ formats are the slow ones.
Expect    a row per format and corpus, as `quality.py measure` writes them.

A format is rounded by llama.cpp's own C library and read back by the gguf package. Its importance
matrix is none, that of a calibration text (@NAME of a --calibration), or the prompt's own
(@prompt). What is rounded is what ttq_jax rounds: the linear layers of the blocks. The prompt is
read with unquantized weights, the tokens after it are scored with rounded ones.

Two things are done to the weights first. Blocks of 256 weights lie along the input channels, and a
width that 256 does not divide gets none from llama.cpp. So as many rows are joined as it takes. And
the packaged files were rounded in runs of 32 input channels before. So the channels are permuted at
random, that no format finds again the grid of its own file.
"""

import argparse
import ctypes
import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from quality import CALIBRATION_TOKENS, Results, corpus_text, protocol_data, spread

import ttq_jax as ttq
from ttq_jax.evaluation.corpora import calibration_windows, sha256
from ttq_jax.evaluation.describe import device, versions
from ttq_jax.evaluation.perplexity import Protocol
from ttq_jax.files import check_destination
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.offline.calibrate import calibrate, observe_tokens
from ttq_jax.types import SITE_OF, SITES, Params, kernels

READS = ttq.preset("ttq").reads
"""The mean square of each input channel: what llama.cpp calls the importance matrix."""


@functools.cache
def library() -> Any:
    """llama.cpp's quantizers.

    Raises:
      SystemExit: the package is not installed.
    """
    try:
        import llama_cpp
    except ImportError:
        raise SystemExit("expected llama-cpp-python: pip install llama-cpp-python") from None
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return lib


def format_named(name: str) -> tuple[gguf.GGMLQuantizationType, str]:
    """(type, source of the importance matrix or "") of `Q4_K`, `IQ4_XS@c4`, `Q3_K@prompt`.

    Raises:
      SystemExit: no such format, or one that is not made without an importance matrix.
    """
    kind, _, source = name.partition("@")
    if kind not in gguf.GGMLQuantizationType.__members__:
        raise SystemExit(f"format {name!r}: expected a type of GGUF such as Q4_K, got {kind!r}")
    made = gguf.GGMLQuantizationType[kind]
    if not source and library().ggml_quantize_requires_imatrix(int(made)):
        raise SystemExit(f"format {name}: expected an importance matrix; add @prompt or @NAME")
    return made, source


def bits_of(kind: gguf.GGMLQuantizationType) -> float:
    """Stored bits per weight; everything of a format lies in its blocks."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return 8 * size / weights


def rows_joined(d_in: int, d_out: int, kind: gguf.GGMLQuantizationType) -> int:
    """Fewest rows whose weights are whole blocks.

    Raises:
      SystemExit: the matrix has not so many, or none that divide its rows.
    """
    block = gguf.GGML_QUANT_SIZES[kind][0]
    joined = block // math.gcd(block, d_in)
    if d_out % joined:
        raise SystemExit(
            f"{kind.name}: {joined} rows of {d_in} make whole blocks of {block}, and {d_out} rows "
            "are not divided by that"
        )
    return joined


def rounded(
    w: np.ndarray, kind: gguf.GGMLQuantizationType, importance: np.ndarray | None
) -> np.ndarray:
    """A weight after rounding by llama.cpp.

    Args:
      w: float32[d_in, d_out].
      kind: the format.
      importance: float32[d_in], or None.

    Returns:
      float32[d_in, d_out].
    """
    d_in, d_out = w.shape
    order = np.random.default_rng(0).permutation(d_in)
    joined = rows_joined(d_in, d_out, kind)
    rows = np.ascontiguousarray(w.T[:, order], np.float32).reshape(d_out // joined, -1)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.empty((len(rows), rows.shape[1] // block * size), np.uint8)
    weigh = None if importance is None else np.tile(importance[order].astype(np.float32), joined)
    written = library().ggml_quantize_chunk(
        int(kind), rows.ctypes.data, made.ctypes.data, 0, *rows.shape,
        None if weigh is None else weigh.ctypes.data,
    )  # fmt: skip
    assert written == made.nbytes, (kind, written, made.nbytes)
    out = np.empty_like(w, order="F")
    out.T[:, order] = gguf.quants.dequantize(made, kind).reshape(d_out, d_in)
    return out


def rounded_tree(
    params: Params, kind: gguf.GGMLQuantizationType, importance: dict[str, np.ndarray] | None
) -> Params:
    """The tree with the blocks' linear layers rounded, a layer at a time on every core.

    Args:
      params: the dense tree.
      kind: the format.
      importance: by site, float32[L, d_in]; or None.

    Returns:
      A dense tree.
    """

    def one(name: str, layer: int) -> np.ndarray:
        weight = np.asarray(dense[name][layer], np.float32)
        weigh = None if importance is None else importance[SITE_OF[name]][layer]
        return rounded(weight, kind, weigh)

    dense = kernels(params["layers"])
    layers = dict(params["layers"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, stack in dense.items():
            made = list(pool.map(functools.partial(one, name), range(len(stack))))
            layers[name] = layers[name] | {"kernel": jnp.asarray(np.stack(made), stack.dtype)}
    return params | {"layers": layers}


@functools.partial(jax.jit, static_argnames=("config", "length"))
def score(dense: Params, decoded: Params, tokens: jax.Array, *, config: Any, length: int) -> Any:
    """Negative log-likelihood of what follows the first tokens, nats; see `score_window`."""
    read, rest = tokens[None, :length], tokens[None, length:-1]
    cache = empty_cache(config, 1, len(tokens), activation_dtype(dense))
    hidden, cache, _ = forward(config, dense, read, jnp.ones(read.shape, bool), cache)
    after, _, _ = forward(config, decoded, rest, jnp.ones(rest.shape, bool), cache)
    hidden = jnp.concatenate([hidden[0, -1:], after[0]])
    log_probs = jax.nn.log_softmax(logits(config, decoded, hidden))
    return -jnp.sum(jnp.take_along_axis(log_probs, tokens[length:, None], axis=1))


def importance_of(moments: dict[str, Any]) -> dict[str, np.ndarray]:
    """By site, the mean square of each channel, float32[L, d_in]."""
    return {site: np.asarray(moments[site].mean_power(2.0)) for site in SITES if site in moments}


def scorer(model: ttq.Model, name: str, calibration: dict[str, str], protocol: Protocol) -> Any:
    """From a window to the loss of its scored tokens, by one format or unquantized weights."""
    score_by = functools.partial(score, config=model.config, length=protocol.prompt_tokens)
    if name == "none":
        return lambda window: score_by(model.params, model.params, window)
    kind, source = format_named(name)
    if source == "prompt":

        def own(window: jax.Array) -> Any:
            prompt = window[None, : protocol.prompt_tokens]
            moments = observe_tokens(model.params, prompt, config=model.config, reads=READS)
            made = rounded_tree(model.params, kind, importance_of(moments))
            return score_by(model.params, made, window)

        return own
    importance = None
    if source:
        if source not in calibration:
            raise SystemExit(f"{name}: expected @prompt or @NAME of a --calibration NAME=FILE")
        cut = calibration_windows(
            model.tokenizer, calibration[source], tokens=CALIBRATION_TOKENS, window=512
        )
        importance = importance_of(calibrate(model, cut, READS))
    made = rounded_tree(model.params, kind, importance)
    return lambda window: score_by(model.params, made, window)


def measure(args: argparse.Namespace) -> None:
    """Scores every format on every corpus; rows that are there are kept."""
    check_destination(args.out, parents=True)
    for name in args.format:
        format_named(name)
    protocol = Protocol(window=args.window, prompt_tokens=args.prompt_tokens)
    model = ttq.load(args.model)
    if model.config.n_experts:
        raise SystemExit(f"--model {args.model}: mixtures of experts are not compared here")
    texts = dict(map(corpus_text, args.corpus))
    calibration = dict(map(corpus_text, args.calibration))
    store = Results(args.out)
    for name in ["none", *args.format]:
        missing = [corpus for corpus in texts if (name, corpus) not in store.read()]
        nll_of = scorer(model, name, calibration, protocol) if missing else None
        for corpus in missing:
            windows = ttq.cut_windows(model.tokenizer, texts[corpus], protocol.window)
            at = spread(len(windows), args.windows)
            nll = [float(nll_of(jnp.asarray(windows[i]))) for i in at]
            rows = store.read()
            rows[name, corpus] = {
                "model": args.model, "recipe_name": name, "corpus": corpus,
                "corpus_sha256": sha256(texts[corpus]), "protocol": protocol_data(protocol),
                "scored": protocol.scored, "recipe": None, "windows": at, "nll": nll,
                "effective_bits": 32.0 if name == "none" else bits_of(format_named(name)[0]),
                "device": device(),
                "versions": versions(*(() if name == "none" else ("llama-cpp-python",))),
            }  # fmt: skip
            store.write(rows)
            mean = math.exp(sum(nll) / len(nll) / protocol.scored)
            print(f"{args.model} {name} {corpus}: {mean:.3f}, {len(nll)} windows", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--format", action="append", required=True, metavar="FORMAT[@SOURCE]",
                        help="as Q4_K, IQ4_XS@prompt, Q3_K@NAME of a calibration")  # fmt: skip
    parser.add_argument("--windows", type=int, default=16, help="per corpus, default: %(default)s")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True, help="a row per format and corpus")
    measure(parser.parse_args(argv))


if __name__ == "__main__":
    main()
