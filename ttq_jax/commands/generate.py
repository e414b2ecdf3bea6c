"""`ttq generate`: continues prompts with weights made for them."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttq_jax import speculation
from ttq_jax.chat.ask import Asked, ask, check_messages
from ttq_jax.chat.render import Renderer
from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.store import check_destination
from ttq_jax.commands.conversation import Conversation, begin
from ttq_jax.commands.options import (
    cache_in_json,
    check_file,
    needs_of,
    note_unused,
    prompts_of,
    recipe_of,
)
from ttq_jax.commands.output import print_json, print_piece, print_text
from ttq_jax.config import ConfigError
from ttq_jax.draft_costs import chooses
from ttq_jax.evaluation.describe import describe_method, head
from ttq_jax.evaluation.preparation import calibration_text, load_model, prepare_offline
from ttq_jax.evaluation.progress import Progress
from ttq_jax.evaluation.timings import Timings, time_answers
from ttq_jax.generate import generate
from ttq_jax.generation import Generation
from ttq_jax.mesh import parse as parse_mesh
from ttq_jax.partition import on
from ttq_jax.prefill import check_chunk
from ttq_jax.processes import expect_same
from ttq_jax.prompts import PromptError, pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling
from ttq_jax.stream import stream
from ttq_jax.types import Offline


def _print_json(
    args: argparse.Namespace, model: Model, recipe: Recipe | None, made: Generation,
    asked: Asked, of: list[Any], sampling: Sampling, timings: Timings | None,
) -> None:  # fmt: skip
    """One batch's answers, an object each."""
    rows = zip(
        asked.texts, of, made.texts, made.tokens, made.prompt_tokens, made.stopped, strict=True
    )  # fmt: skip
    for i, (prompt, said, text, tokens, length, stopped) in enumerate(rows):
        print_json(
            head(model, args.method, recipe, made.effective_bits)
            | {
                "model_bits": round(made.model_bits, 4),
                "bytes_per_token": made.bytes_per_token,
                "prompt": prompt,
                "messages": check_messages(said) if args.chat else None,
                "text": text,
                "prompt_tokens": length,
                "new_tokens": len(tokens),
                "max_new_tokens": args.max_new_tokens,
                "stopped": stopped,
                "sampling": dataclasses.asdict(sampling),
                "seed": args.seed or 0,
                "batch_size": len(of),
                **cache_in_json(args),
                **_experts_in_json(made),
                **({"drafts": made.drafts[i].describe()} if made.drafts else {}),
                **({"draft_costs": made.draft_costs.describe()} if made.draft_costs else {}),
                # Of the batch, so in its first row alone.
                "timings": timings.describe() if timings and not i else None,
            }
        )


def _experts_in_json(made: Generation) -> dict[str, float]:
    """The share of unreached experts, where there are any."""
    share = made.unreached_experts
    return {} if share is None else {"unreached_experts": round(share, 4)}


def _tell(
    args: argparse.Namespace, recipe: Recipe | None, made: Generation, timings: Timings | None,
    progress: Progress,
) -> None:  # fmt: skip
    """What is not the answer, on stderr."""
    new, why = sum(map(len, made.tokens)), ", ".join(sorted(set(made.stopped)))
    progress.note(f"{sum(made.prompt_tokens)} prompt tokens, {new} new; stopped by: {why}")
    bits = made.effective_bits, made.model_bits, made.bytes_per_token
    progress.note(describe_method(args.method, recipe, *bits))
    if made.drafts:
        progress.note(sum(made.drafts[1:], made.drafts[0]).in_words())
    if made.draft_costs:
        progress.note(made.draft_costs.in_words())
    if made.unreached_experts is not None:
        progress.note(
            f"{made.unreached_experts:.0%} of the experts got no token of the prompt and were "
            "quantized by the prior"
        )
    if timings:
        progress.note(timings.in_words())


def _check_conversation(
    args: argparse.Namespace, recipe: Recipe | None, progress: Progress
) -> None:
    """Refuses a conversation whose turns would not remember each other.

    Raises:
      ConfigError: neither messages nor a decay, or several prompts at once.
    """
    decay = 0.0 if recipe is None else recipe.source.decay
    if args.conversation is None:
        if decay:
            progress.note(
                "moments.decay has no effect without --conversation: each prompt is a first turn"
            )
        return
    if not decay and not args.chat:
        raise ConfigError(
            f"--conversation: recipe {args.method} keeps nothing from turn to turn; set the weight "
            "of the earlier turns, above 0 and up to 1, as in --set moments.decay=0.5, or add "
            "--chat, which keeps messages"
        )
    if args.batch_size != 1:
        raise ConfigError(
            f"--conversation: expected --batch-size 1, one turn at a time, got {args.batch_size}"
        )
    check_destination(Path(args.conversation).expanduser())


def _check(args: argparse.Namespace) -> None:
    """Refuses options that are out of range or have no meaning together.

    Raises:
      ConfigError: one of them.
    """
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise ConfigError(
            "expected --batch-size and --max-new-tokens of at least 1, got "
            f"{args.batch_size} and {args.max_new_tokens}"
        )
    if args.system is not None and not args.chat:
        raise ConfigError("--system: a system message needs roles; add --chat")
    if args.stream and args.json:
        raise ConfigError("--stream: JSON is printed when it is complete; leave out one of the two")
    if args.stream and args.batch_size != 1:
        raise ConfigError(
            f"--stream: expected --batch-size 1, one answer at a time, got {args.batch_size}"
        )
    if args.mesh is not None:
        parse_mesh(args.mesh)
    if args.processes is not None and chooses(args.speculate):
        raise ConfigError(
            "--processes: --speculate auto measures times, which differ from process to process; "
            "give the number of drafts"
        )
    for option in ("stream", "conversation"):
        if args.processes is not None and getattr(args, option):
            raise ConfigError(
                f"--processes: --{option} answers in one process only, which reads what every "
                "device has; leave out one of the two"
            )


def _questions(
    args: argparse.Namespace, prompts: list[Any], talk: Conversation, render: Renderer
) -> Iterator[tuple[Asked, list[Any]]]:
    """Batches in the order of the prompts: what is read, and what it was made of.

    Raises:
      PromptError: a conversation where a turn was expected.
    """
    if args.conversation and args.chat:
        for text in prompts:
            if not isinstance(text, str):
                raise PromptError(
                    "--conversation: expected one message of the user's per turn, got whole "
                    "conversations; leave it out, or give texts"
                )
            said = [talk.turn(text, args.system)]
            yield ask(talk.model, said, chat=True, render=render), said
        return
    if args.chat:
        prompts = [begin(check_messages(one), args.system) for one in prompts]
    # All prompts are checked before the first is answered, so that no run stops half way.
    asked = ask(talk.model, prompts, chat=args.chat, render=render)
    pad_prompts(
        asked.rows, max_positions=talk.model.config.max_positions,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    for at in range(0, len(prompts), args.batch_size):
        upto = at + args.batch_size
        yield asked.part(at, upto), prompts[at:upto]


def _streamed(
    model: Model, asked: Asked, show: str, make: dict[str, Any], progress: Progress
) -> Generation:
    """Prints an answer while it is decoded."""
    with progress.stage("compiling and reading the prompt"):
        answer = stream(model, asked, **make)
        first = list(itertools.islice(answer, 2))  # of each of the two programs one
    print_piece(show)
    for piece in itertools.chain(first, answer):
        print_piece(piece)
    print_piece("\n")
    return answer.generation


def _shown(text: str) -> str:
    """An answer after its prompt."""
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def _answer(
    args: argparse.Namespace, model: Model, asked: Asked, recipe: Recipe | None, offline: Offline,
    progress: Progress, of: list[Any],
) -> Generation:  # fmt: skip
    """Answers a batch and prints the answers."""
    make: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "seed": args.seed or 0,
        "sampling": Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        "speculate": args.speculate, "prefill_chunk": args.prefill_chunk,
        "cache_dtype": args.cache_dtype,
    }  # fmt: skip
    # In a chat stdout is the answer; a text is printed with what continues it.
    heads = [""] * len(asked.texts) if args.chat else asked.texts
    how = make | {"recipe": recipe, "offline": offline}
    if args.stream:
        made = _streamed(model, asked, heads[0], how, progress)
    else:
        made = generate(model, asked, batch_size=len(asked.rows), **how)
        progress.clear()
    if not (args.stream or args.json):
        for before, text in zip(heads, made.texts, strict=True):
            print_text(before + _shown(text) if before else text)
    timings = None
    if args.timings:
        named, known = {args.method: recipe}, {args.method: offline}
        timings = time_answers(model, asked, named, offline=known, **make)[args.method]
    if args.json:
        _print_json(args, model, recipe, made, asked, of, make["sampling"], timings)
    else:
        _tell(args, recipe, made, timings, progress)
    return made


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq generate`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: an option out of range.
    """
    _check(args)
    recipe = recipe_of(args)
    Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    speculation.check(args.speculate, recipe)
    check_chunk(args.prefill_chunk, recipe)
    _check_conversation(args, recipe, progress)
    note_unused(args, recipe, progress)
    check_file(args.save_recipe)
    needs = needs_of(args, recipe)
    prompts, text = prompts_of(args), calibration_text(needs, progress)
    expect_same("the prompts", prompts)
    # What verifies needs the unquantized tables.
    tables = None if args.speculate else recipe
    model, _ = load_model(
        args.model, args.dtype, progress, args.ignore_key, tables,
        mesh=args.mesh, dense_memory=args.dense_memory,
        batches=dict.fromkeys(
            min(args.batch_size, len(prompts) - at)
            for at in range(0, len(prompts), args.batch_size)
        ),
    )  # fmt: skip
    with on(model.mesh):
        check_selection(model.params, recipe)
    if model.chat is not None and not args.chat:
        progress.note(
            f"{args.model} is an instruct model: --chat asks it in the form it was taught"
        )
    place = Path(args.conversation).expanduser() if args.conversation else None
    talk = Conversation(model, place)
    talk.load(recipe, args.chat, progress)
    with Renderer() as render:
        questions = _questions(args, prompts, talk, render)
        first = next(questions)
        if args.save_recipe and recipe is not None:
            save_recipe(args.save_recipe, recipe)
        offline, _ = prepare_offline(needs, model, text, progress)
        done = 0
        stage = (
            contextlib.nullcontext(lambda *_: None)
            if args.stream
            else progress.stage("compiling and generating")
        )
        with stage as update:
            for asked, of in itertools.chain([first], questions):
                made = _answer(args, model, asked, recipe, talk.offline(offline), progress, of)
                if place is not None:
                    talk.add(recipe, made, of[0] if args.chat else [])
                done += len(of)
                if len(prompts) > 1:
                    update(done, len(prompts))
