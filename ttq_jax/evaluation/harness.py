"""EleutherAI's lm-evaluation-harness on weights made from each prompt.

    ttq lm-eval --model ttq --model_args model=smollm2,recipe=fast,bits=4 --tasks NAME

is lm_eval's own command line with one more model. Its `--model_args` are the options in
`harness_arguments.OPTIONS`, which mean the same as for `ttq`, and settings as for `ttq --set`, such
as `rounding.damping=0.3`. From Python:
`lm_eval.simple_evaluate(model=TTQModel(model, recipe), …)`.

Weights come from the text before what is scored or generated, never from that text:

    loglikelihood          from the context; requests that share it are scored together
    generate_until         from the prompt
    loglikelihood_rolling  lm_eval's windows, cut into stretches of doubling length (`stretches`):
                           from all text in the window before a stretch. The first one has a single
                           token before it (at the start of a document, begin-of-text), from which
                           weights learn next to nothing: there a prior helps.

A recipe that reads no prompt scores a window in one piece. Besides the weights, one thing differs
from lm_eval's adapter for transformers: a rolled text begins with exactly one begin-of-text token,
which is not scored, even if the model's prompts have one of their own. There are no batches, and
jax chooses the device: `--batch_size` and `--device` have no effect.
"""

import collections
import functools
import importlib.util
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.continuations import continue_until, score_continuations, stretches
from ttq_jax.evaluation.describe import describe_method, head
from ttq_jax.evaluation.harness_arguments import generation_of, load_arguments
from ttq_jax.evaluation.progress import Progress
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes
from ttq_jax.prompts import PromptError
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling, make_key
from ttq_jax.types import Offline, Params, effective_bits, model_bits

_WEIGHTS_FROM = {
    "loglikelihood": "the context",
    "generate_until": "the prompt",
    "loglikelihood_rolling": "the text in the window before each of its doubling stretches",
}

# (context, continuation) as texts, or None, and as token ids.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


class MissingExtra(ImportError):
    """lm_eval is not installed."""


class _Adapter:
    """What `TTQModel` implements of TemplateLM."""

    # lm_eval's own.
    cache_hook: Any
    rank: int

    def __init__(
        self,
        model: Model,
        recipe: Recipe | None,
        *,
        offline: Offline | None = None,
        max_length: int | None = None,
        seed: int = 0,
        said: Mapping[str, Any] | None = None,
    ):
        """Wraps a loaded model.

        Args:
          model: from `load`.
          recipe: how to quantize, see `preset`; None for the unquantized model.
          offline: from `prepare`; None prepares it here, except for recipes that need a corpus.
          max_length: how many tokens of the context are used, from 2 to all; None for all.
          seed: of the sampling.
          said: further facts for `get_model_info`; "method" is the recipe's name.

        Raises:
          ConfigError: a length beyond the model's context.
        """
        super().__init__()
        context = model.config.max_positions
        if max_length is not None and not 2 <= max_length <= context:
            raise ConfigError(f"max_length: expected 2 to {context} tokens, got {max_length}")
        self.model, self.recipe, self.seed = model, recipe, seed
        self.max_length = max_length or context
        self.offline = prepare(model, recipe) if offline is None else offline
        self.said = {"method": "none" if recipe is None else "custom"} | dict(said or {})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> Any:
        """The same as `create_from_arg_obj`, from "key=value,…"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Any:
        """Loads the model and prepares the recipe that model arguments name.

        Args:
          arg_dict: see the module's docstring.
          additional_config: lm_eval's batch size and device, which have no effect.

        Returns:
          The adapter.
        """
        if (additional_config or {}).get("batch_size", 1) not in {None, 1, "1"}:
            Progress().note("the batch size has no effect: each prompt has weights of its own")
        made = cls(**load_arguments(arg_dict))
        shapes, config = made.shapes, made.model.config
        bits = effective_bits(shapes), model_bits(shapes), bytes_per_token(shapes, config)
        Progress().note(describe_method(made.said["method"], made.recipe, *bits))
        return made

    @property
    def shapes(self) -> Params:
        """Shapes and dtypes of the tree that scores and answers."""
        return decoded_shapes(self.model.params, self.model.config, self.recipe, self.offline)

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight of the linear layers that score and answer."""
        return effective_bits(self.shapes)

    def get_model_info(self) -> dict[str, Any]:
        """What made the numbers; lm_eval puts it into the "config" of its results."""
        said, name = dict(self.said), self.model.name
        if Path(name).expanduser().exists():
            name = Path(name).name
        made = head(self.model, said.pop("method"), self.recipe, self.effective_bits)
        more = {
            "model": name,
            "model_bits": round(model_bits(self.shapes), 4),
            "bytes_per_token": bytes_per_token(self.shapes, self.model.config),
            "max_length": self.max_length,
            "seed": self.seed,
            "weights_from": _WEIGHTS_FROM,
        }
        return {"ttq": made | more | said}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
          ConfigError: the model has none.
        """
        if not self.model.eos_ids:
            raise ConfigError(
                f"{self.model.name}: lm_eval needs a begin- or end-of-text token before a text "
                "without context, but the model has neither; set eos_token_id in its configuration"
            )
        return self.model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: begin-of-text, else end-of-text."""
        begin = self.model.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Only needed for chat templates, which are not supported.

        Raises:
          ConfigError: always.
        """
        raise ConfigError(
            "chat templates are not supported: leave out --apply_chat_template and write the "
            "turns into the task's doc_to_text"
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """No template; asking for one is an error, see `tokenizer_name`."""
        return self.tokenizer_name if chat_template else ""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids.

        Args:
          string: any text.
          add_special_tokens: False for no begin-of-text token; else it is added where the model's
            prompts have it, but not to a text that begins with it.
          **kwargs: not looked at.

        Returns:
          The ids.
        """
        return self.model.tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores continuations; those of one prompt share its weights.

        Raises:
          PromptError: a continuation without a token, or longer than the context.
        """
        from tqdm import tqdm

        groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        cut = 0
        for i, (_, context, continuation) in enumerate(requests):
            # The last token is predicted and not read.
            room = self.max_length + 1 - len(continuation)
            if not continuation or room < 1:
                raise PromptError(
                    f"request {i + 1}: expected a continuation of 1 to {self.max_length} tokens, "
                    f"got {len(continuation)}"
                )
            cut += len(context) > room
            groups[tuple(context[-room:])].append(i)
        if cut:
            Progress().note(
                f"{cut} of {len(requests)} requests are longer than {self.max_length} tokens; "
                "their contexts are cut on the left"
            )
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="ttq: loglikelihood"
        )
        with bar:
            # The longest first: one that does not fit into memory fails at once.
            for prompt, members in sorted(groups.items(), key=lambda group: -len(group[0])):
                scores = score_continuations(
                    self.model, prompt, [requests[i][2] for i in members],
                    recipe=self.recipe, offline=self.offline,
                )  # fmt: skip
                for i, answer in zip(members, scores, strict=True):
                    answers[i] = answer
                    # None: a piece of a rolled text.
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(members))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, see the module's docstring.

        Args:
          requests: lm_eval's, each with one text.
          disable_tqdm: no progress.

        Returns:
          Per text, nats.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        reads_prompt = self.recipe is not None and self.recipe.source.of == "prompt"
        pieces: list[_Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for window in map(make_disjoint_window, windows):
                cut = stretches(*window) if reads_prompt else [window]
                pieces.extend((None, *piece) for piece in cut)
            owners.extend([i] * (len(pieces) - len(owners)))
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(
            owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True
        ):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts.

        A sampled answer depends only on the prompt and the seed; a prompt that comes again gets
        another answer.

        Args:
          requests: lm_eval's, each with a context and generation_kwargs, see `generation_of`.
          disable_tqdm: no progress.

        Returns:
          The answers, each up to the first of its `until` texts.
        """
        from tqdm import tqdm

        wanted = [(request.args[0], *generation_of(request.args[1])) for request in requests]
        asked: collections.Counter[str] = collections.Counter()
        answers = []
        bar = tqdm(wanted, disable=disable_tqdm or self.rank != 0, desc="ttq: generate_until")
        for request, (context, until, limit, sampling) in zip(requests, bar, strict=True):
            key = make_key(self.seed)
            for salt in (zlib.crc32(context.encode()), asked[context]):
                key = jax.random.fold_in(key, jax.device_put(np.uint32(salt)))
            asked[context] += 1
            answers.append(self._answer(context, until, limit, sampling, key))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _answer(
        self, context: str, until: Sequence[str], limit: int, sampling: Sampling, key: jax.Array
    ) -> str:
        """The answer to one prompt.

        Raises:
          PromptError: the answer leaves no room for a prompt.
        """
        room = self.max_length - limit
        if room < 1:
            raise PromptError(
                f"expected fewer new tokens than the context of {self.max_length}, got {limit}; "
                "lower the task's max_gen_toks"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            Progress().note(
                f"a prompt of {len(tokens)} tokens is cut on the left to its last {room}"
            )
        return continue_until(
            self.model, tokens[-room:], until, limit, key,
            recipe=self.recipe, offline=self.offline, sampling=sampling,
        )  # fmt: skip


@functools.cache
def model_class() -> type:
    """`TTQModel`, made and registered with lm_eval as "ttq" when it is first asked for.

    Returns:
      The class.

    Raises:
      MissingExtra: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra('lm_eval is not installed; run: pip install "ttq-jax[lm-eval]"')
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    @register_model("ttq")
    class TTQModel(_Adapter, TemplateLM):
        """A model of lm_eval whose weights are made from each prompt."""

    return TTQModel


def __getattr__(name: str) -> Any:
    if name == "TTQModel":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
