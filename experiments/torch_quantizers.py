"""RTN, AWQ and TTQ in PyTorch, on transformers' models: the second opinion of `compare_torch.py`.

Written from the method's definition and from nothing of ttq_jax. Weights are fake-quantized: they
are rounded and put back as the float32 matrices that they stand for.

    R = W − BA         BA the best approximation of W of the given rank; none for rank 0
    D = 1              RTN
        (m + λ)^α      TTQ, m the root mean square of each input channel over its mean
        m^α            AWQ, m the mean magnitude over its mean, the α of the least error
    Ŵ = Q(R D) D⁻¹ + BA, with Q rounding each group of a row to the nearest point of its grid
"""

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers

SCALES = ("none", "power_law", "searched")
ALPHA, LAM = 0.5, 0.4
CANDIDATES = 20
FLOOR = 1e-4

Key = tuple[int, str]  # (layer, name of the projection inside its block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How weights are quantized.

    scale: one of `SCALES`: RTN's, TTQ's, AWQ's.
    group_size: weights of a row that share a scale; -1 for the whole row.
    rank: of the part that is kept in floating point, 0 for none.
    coded: bits of a scale and of a zero point, 0 for float32 numbers: scales are whole multiples,
      1 to 2^coded - 1, of a number per row of w, zero points of a part, 2^-coded, of the grid.
    """

    scale: str
    bits: int
    group_size: int = 32
    symmetric: bool = False
    rank: int = 0
    coded: int = 0


class Inputs:
    """Sums over the tokens that a linear layer read."""

    def __init__(self):
        self.count, self.magnitude, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        self.count += len(x)
        self.magnitude = self.magnitude + x.abs().sum(0)
        self.square = self.square + x.square().sum(0)


def linears(model: Any) -> dict[Key, torch.nn.Linear]:
    """The linear layers of a model's blocks; the embedding and the head are not among them."""
    return {
        (i, name): module
        for i, block in enumerate(model.get_decoder().layers)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@contextlib.contextmanager
def watching(model: Any) -> Iterator[dict[Key, Inputs]]:
    """What each linear layer of the blocks reads inside the `with`."""
    layers = linears(model)
    seen = {key: Inputs() for key in layers}
    handles = [
        module.register_forward_pre_hook(lambda _, args, key=key: seen[key].add(args[0]))
        for key, module in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def round_groups(w: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Quantizes and dequantizes w[d_out, d_in], group by group along d_in."""
    d_out, d_in = w.shape
    size = d_in if rule.group_size == -1 else min(rule.group_size, d_in)
    g = torch.nn.functional.pad(w, (0, -d_in % size)).reshape(d_out, -1, size)
    if rule.symmetric:
        low, high = -(2 ** (rule.bits - 1)), 2 ** (rule.bits - 1) - 1
        scale = as_coded(g.abs().amax(-1, keepdim=True) / high, rule)
        zero = torch.zeros_like(scale)
    else:
        low, high = 0, 2**rule.bits - 1
        least, most = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        scale = as_coded((most - least) / high, rule)
        zero = -least / scale
        if rule.coded:
            steps = 2.0 ** (rule.coded - rule.bits)
            zero = torch.round(zero * steps).clamp(0, 2**rule.coded - 1) / steps
    rounded = (torch.round(g / scale + zero).clamp(low, high) - zero) * scale
    # A group of zeros has no scale.
    rounded = torch.where(scale > 0, rounded, 0.0)
    return rounded.reshape(d_out, -1)[:, :d_in]


def as_coded(scale: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Scales [d_out, groups, 1] as they are stored."""
    if not rule.coded:
        return scale
    most = 2**rule.coded - 1
    unit = scale.amax(1, keepdim=True) / most
    return torch.where(unit > 0, torch.round(scale / unit).clamp(1, most) * unit, scale)


def power_law(inputs: Inputs) -> torch.Tensor:
    """TTQ's D[d_in]."""
    rms = (inputs.square / inputs.count).sqrt()
    return (rms / rms.mean() + LAM) ** ALPHA


def searched(w: torch.Tensor, inputs: Inputs, rule: Rule) -> torch.Tensor:
    """AWQ's D[d_in]: of the candidates the one whose rounding the inputs feel least."""
    magnitude = inputs.magnitude / inputs.count
    m = (magnitude / magnitude.mean()).clamp(min=FLOOR)
    best, least = None, float("inf")
    for i in range(CANDIDATES):
        d = m ** (i / CANDIDATES)
        d = d / (d.max() * d.min()).sqrt()
        error = (w - round_groups(w * d, rule) / d).square()
        felt = float((error.sum(0) * inputs.square / inputs.count).sum())
        if felt < least:
            best, least = d, felt
    assert best is not None, "an error is finite"
    return best


def quantize(
    w: torch.Tensor, inputs: Inputs | None, rule: Rule, factors: tuple | None = None
) -> torch.Tensor:
    """Ŵ[d_out, d_in] of w; `factors` are B[d_out, r] and A[r, d_in], None for rank 0."""
    kept = torch.zeros_like(w) if factors is None else factors[0] @ factors[1]
    rest = w - kept
    if rule.scale == "none":
        return round_groups(rest, rule) + kept
    d = power_law(inputs) if rule.scale == "power_law" else searched(rest, inputs, rule)
    return round_groups(rest * d, rule) / d + kept


def best_factors(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of the best approximation of w of a rank."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def new_cache(model: Any) -> dict[str, Any]:
    """An empty cache for the model to fill, by its name in this version of transformers."""
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    return {name: transformers.DynamicCache(config=model.config)}


def score(
    dense: Any,
    tokens: torch.Tensor,
    prompt_tokens: int | None,
    scorer: Callable[[Mapping[Key, Inputs]], Any],
) -> float:
    """Summed negative log-likelihood of a window's scored tokens, nats.

    tokens: int64[W].
    prompt_tokens: P: the dense model reads the first P tokens, and what `scorer` gives reads the
      others after the dense model's keys and values, which score themselves. None: the dense
      model only watches the window, all of which is read and scored again.
    scorer: from what the dense model's layers read to the model that scores.
    """
    tokens, kept = tokens[None], new_cache(dense)
    with torch.no_grad():
        with watching(dense) as seen:
            read = dense(tokens[:, :prompt_tokens], use_cache=True, **kept)
        model = scorer(seen)
        if prompt_tokens is None:
            logits, targets = model(tokens).logits[0, :-1], tokens[0, 1:]
        else:
            # The dense model's last state predicts the first token after the prompt.
            logits, targets = read.logits[0, -1:], tokens[0, prompt_tokens:]
            if len(targets) > 1:
                rest = tokens[:, prompt_tokens:-1]
                after = model(rest, use_cache=True, **kept).logits[0]
                logits = torch.cat([logits, after])
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


class FakeQuantized:
    """A model and a copy of it, whose weights are those of a rule."""

    def __init__(self, dense: Any):
        self.dense, self.copy = dense, copy.deepcopy(dense)
        self._svd: dict[int, dict[Key, tuple]] = {}
        self.rule: Rule | None = None

    def prepare(self, rule: Rule, calibration: torch.Tensor | None = None) -> None:
        """What comes before any window: factors, and all weights if no prompt is looked at.

        calibration: int64[n, T], what AWQ looks at.
        """
        self.rule = rule
        if rule.rank and rule.rank not in self._svd:
            self._svd[rule.rank] = {
                key: best_factors(module.weight.detach(), rule.rank)
                for key, module in linears(self.dense).items()
            }
        if rule.scale == "power_law":
            return
        seen: dict[Key, Inputs] = {}
        if rule.scale == "searched":
            if calibration is None:
                raise ValueError("a searched scale looks at a corpus: give calibration tokens")
            with torch.no_grad(), watching(self.dense) as seen:
                for row in calibration:
                    self.dense(row[None])
        self._fill(seen)

    def _fill(self, seen: Mapping[Key, Inputs]) -> Any:
        """The copy, its weights made anew from those of the dense model."""
        assert self.rule is not None, "prepare comes first"
        factors, copies = self._svd.get(self.rule.rank, {}), linears(self.copy)
        with torch.no_grad():
            for key, module in linears(self.dense).items():
                w = quantize(module.weight, seen.get(key), self.rule, factors.get(key))
                copies[key].weight.copy_(w)
        return self.copy

    def replace(self, weights: Mapping[Key, torch.Tensor]) -> int:
        """Gives the copy these weights; how many of them are not those that it had."""
        apart = 0
        with torch.no_grad():
            for key, module in linears(self.copy).items():
                new, old = weights[key], module.weight
                # Far above rounding, far below a step of 5 bits.
                apart += int(((new - old).abs() > 1e-3 * old.abs().max()).sum())
                old.copy_(new)
        return apart

    def score(self, tokens: torch.Tensor, prompt_tokens: int | None) -> float:
        """See `score`."""
        assert self.rule is not None, "prepare comes first"
        per_prompt = self.rule.scale == "power_law"
        scorer = self._fill if per_prompt else lambda _: self.copy
        return score(self.dense, tokens, prompt_tokens, scorer)

    def score_dense(self, tokens: torch.Tensor, prompt_tokens: int | None) -> float:
        """See `score`, of the model as it is."""
        return score(self.dense, tokens, prompt_tokens, lambda _: self.dense)
