"""Arguments of a wrong type end in an error of ours, which says what was expected.

In a process of its own: here the tests' own checks of signatures would answer first.
"""

import os
import subprocess
import sys

from compilers import QUICKLY
from tiny_files import write_model

CALLS = {
    'ttq.generate(model, "hello", recipe=None)': 'texts: expected a list of prompts, as in ["The',
    "ttq.generate(model, [], recipe=None)": "texts: expected a list of prompts",
    "ttq.generate(model, [b'x'], recipe=None)": "texts: expected a list of prompts",
    'ttq.generate(model, ["a"], recipe="fast")': 'recipe: expected a recipe, as in preset("fast")',
    'ttq.generate("smollm2", ["a"], recipe=None)': "model: expected a model, from load()",
    'ttq.generate(model, ["a"], recipe=None, max_new_tokens=2.5)': "max_new_tokens: expected a who",
    'ttq.generate(model, ["a"], recipe=None, max_new_tokens=True)': "max_new_tokens: expected a wh",
    'ttq.generate(model, ["a"], recipe=None, batch_size=0)': "batch_size: expected at least 1",
    'ttq.generate(model, ["a"], recipe=None, seed="x")': "seed: expected a whole number",
    'ttq.generate(model, ["a"], recipe=None, offline={})': "offline: expected what prepare() retu",
    'ttq.generate(model, ["a"], recipe=None, speculate=2.5)': "speculate: expected a whole number",
    'ttq.generate(model, ["a"], recipe=None, prefill_chunk=200)': "prefill_chunk: expected up to 1",
    "ttq.stream(model, 'a', recipe=ttq.preset('paper'), prefill_chunk=8)": "prefill = 'quantized'",
    "ttq.perplexity(model, np.ones((1, 8), int), recipe=None, prefill_chunk=0.5,"
    " protocol=ttq.Protocol(window=8, prompt_tokens=4))": "prefill_chunk: expected a whole number",
    'ttq.generate(model, ["a"], recipe=None, cache_dtype="int4")': "cache_dtype: expected one of",
    'ttq.generate(model, ["a"], recipe=None, speculate="x")': "speculate: expected a whole number",
    "ttq.acceptance(model, np.ones((1, 8), int), recipe=None)": "expected a recipe whose quantized",
    "ttq.acceptance(model, np.ones((1, 8)), recipe=ttq.preset('ttq'))": "token ids: expected integ",
    "ttq.acceptance('smollm2', [], recipe=ttq.preset('ttq'))": "model: expected a model",
    "ttq.perplexity(model, np.arange(8), recipe=None)": "windows: expected token ids of shape",
    "ttq.perplexity(model, np.ones((1, 8)), recipe=None)": "token ids: expected integers",
    "ttq.perplexity(model, np.full((1, 8), 999), recipe=None)": "ids from 0 to 263, got 999",
    "ttq.perplexity(model, np.full((1, 8), -1), recipe=None)": "ids from 0 to 263, got -1",
    'ttq.perplexity(model, np.ones((1, 8), int), recipe="fast")': "recipe: expected a recipe",
    "ttq.prepare(model, 'awq')": "recipe: expected a recipe",
    "ttq.calibrate(model, np.arange(8), ttq.preset('awq').reads)": "windows: expected token ids of",
    "ttq.preset(4)": "recipe: expected one of none",
    "ttq.preset('ttq', bits='4')": "Grid.bits: expected a whole number, got str '4'",
    "ttq.preset('ttq', group_size=32.0)": "Grid.group_size: expected a whole number, got float",
    "ttq.preset('ttq', scale='searched')": "scale: expected an object such as PowerLaw",
    "ttq.preset('ttq', rounding=ttq.NoScale)": "rounding: expected an object such as Nearest",
    "ttq.preset('none', bits=4)": "recipe none quantizes nothing, so bits has no effect",
    "ttq.PowerLaw(alpha='0.5')": "PowerLaw.alpha: expected a number, got str '0.5'",
    "ttq.PowerLaw(p=16.0)": "scale.p: expected 0.1 to 8",
    "ttq.Sampling(temperature=float('nan'))": "sampling: expected a finite temperature",
    "ttq.Sampling(top_k=5)": "no effect at temperature 0",
    "ttq.Protocol(window='512')": "Protocol.window: expected a whole number",
    "ttq.static_factors(len, ttq.preset('ttq'))": "low_rank.rank: expected a static part, got rank",
    "ttq.read(len, ttq.preset('ttq'), static={})": "static: expected what static_factors made",
    "ttq.read_corpus(3)": "corpus: expected a string",
    "ttq.cut_windows(model.tokenizer, b'text', 8)": "text: expected a string",
    "ttq.with_settings(ttq.preset('ttq'), 'grid.bits=3')": "settings: expected a list of them",
    "ttq.load(7)": "model: expected a path, a hub id or an alias, got int 7",
    "ttq.load('a/b@')": "no such file or directory",
    "ttq.load('smollm2', dense_memory=['host'])": "dense_memory: expected device or host, got [",
    'ttq.generate(model, ["a"], recipe=ttq.preset("ttq", group_size=10**6))': "group size: exp",
    'ttq.generate(model, ["a"], recipe=ttq.preset("ttq", widths=(ttq.Width(select="layers/9/q",'
    " bits=2),)))": "widths: expected a match with layers/",
}  # fmt: skip

SCRIPT = """
import json, sys
import numpy as np
import ttq_jax as ttq
model = ttq.load(sys.argv[1])
said = {}
for call in json.load(sys.stdin):
    try:
        said[call] = repr(eval(call))
    except ttq.Error as e:
        said[call] = str(e)
print(json.dumps([said, repr(model)]))
"""


def test_every_likely_slip_is_named(tmp_path):
    import json

    path = write_model(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path], input=json.dumps(list(CALLS)), text=True,
        capture_output=True, env=os.environ | QUICKLY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, shown = json.loads(done.stdout)
    for call, says in CALLS.items():
        assert says in said[call], f"{call}: {said[call]}"
        assert len(said[call]) < 400
    assert shown == f"Model({str(path)!r}: llama, 2 layers, width 64, float32)"
