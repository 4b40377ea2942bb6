"""Generate text from a trained model, with test-time training on the prompt, and save sessions.

examples:
  tttjax generate runs/first --prompt "def main(" --max-tokens=100
      applies inner updates to the prompt and to generated text
  tttjax generate runs/first --prompt-file=book.txt --save-session=book.session --max-tokens=0
      prefills only, and saves the state to a session file
  tttjax generate runs/first --session=book.session --prompt " The end of the story:" --samples=3
      continues the session with three samples; book.session is not changed
  tttjax generate runs/first --prompts=questions.jsonl --max-tokens=40 > answers.jsonl
      many prompts, in batches of 16
  tttjax generate runs/chat --chat --prompt "What does it do? def f(x): return x + 1"
      the answer of a model that was tuned on conversations

The size of a session file does not grow with the context (except for full attention). A resumed
session is bit-identical, but needs the model that wrote it. `tttjax sessions FILE` describes a
session. See docs/generation.md.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tttjax.cli.flag_types import float32, int32, uint32
from tttjax.cli.model_arguments import add_model_arguments, add_storage_arguments, load_from_args
from tttjax.errors import UserError
from tttjax.inference.options import Sampling
from tttjax.io.locks import hold
from tttjax.io.paths import storage_text, text_path
from tttjax.runtime import progress

if TYPE_CHECKING:
    import numpy as np

    from tttjax.inference.engine import Session
    from tttjax.inference.generator import GeneratedToken
    from tttjax.runs.load import LoadedModel

SAMPLING_HELP = {
    "temperature": "0: greedy decoding",
    "top_k": "sample from the K most likely tokens; 0: off",
    "top_p": "nucleus sampling: smallest set of tokens with this probability; 1: off",
    "min_p": "least probability relative to the most likely token; 0: off",
    "repetition_penalty": "penalty on the logits of tokens that occurred; 1: off",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax generate`."""
    add = parser.add_argument
    add(
        "workdir",
        type=storage_text,
        metavar="WORKDIR",
        help="work directory or checkpoint of a run",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="prompt")
    prompt.add_argument(
        "--prompt-file",
        type=text_path,
        metavar="FILE",
        help="file or URL with the prompt; -: stdin",
    )
    prompt.add_argument(
        "--prompts",
        type=text_path,
        metavar="FILE.jsonl",
        help="many prompts, one JSON string per line; prints JSON Lines",
    )
    add(
        "--chat",
        action="store_true",
        help="a prompt is a user's message: the tokenizer's chat template renders it, and the text "
        "ends with the answer",
    )
    add("--batch", type=int32, default=16, help="batch size for --prompts (default: %(default)s)")
    add(
        "--max-tokens",
        type=int32,
        default=128,
        metavar="N",
        help="tokens to generate (default: %(default)s)",
    )
    add(
        "--samples",
        type=int32,
        default=1,
        metavar="N",
        help="texts per prompt (default: %(default)s)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    add(
        "--seed", type=uint32, default=0, help="seed of the first sample, the next one has seed + 1"
    )
    add("--json", action="store_true", help="print texts, tokens and log-probabilities as JSON")
    sampling = parser.add_argument_group("sampling")
    for field in dataclasses.fields(Sampling):
        sampling.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int32 if field.type is int else float32,
            default=field.default,
            help=f"{SAMPLING_HELP[field.name]} (default: %(default)s)",
        )
    sessions = parser.add_argument_group("sessions")
    add = sessions.add_argument
    add("--session", metavar="FILE", help="session to continue")
    add(
        "--save-session",
        metavar="FILE",
        help="file for the session after prompt and generated text",
    )
    add_storage_arguments(sessions)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`tttjax generate` from parsed arguments; returns the exit code."""
    _check(args)
    if not args.save_session:
        return _run(args)

    from tttjax.inference.session_file import check_writable

    with hold(args.save_session, beside=True):
        check_writable(args.save_session)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from tttjax.inference.session_file import save_session
    from tttjax.parallel.precision import x64_if_configured
    from tttjax.runs.generation import read_prompts
    from tttjax.runs.load import encode_prompt, encode_question, load_or_start_session

    sampling = Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)})
    with progress.report_activity(f"loading {args.workdir}"):
        loaded = load_from_args(args)
    _check_samples(args.samples, loaded)
    with x64_if_configured(loaded.config):
        session = load_or_start_session(loaded, args.session)
        texts = read_prompts(args.prompts) if args.prompts else [_prompt(args)]
        if args.chat:
            from tttjax.data.chat import ChatTemplate

            template = ChatTemplate(loaded.tokenizer)
            prompts = [encode_question(loaded, template, text) for text in texts]
            if template.end.id not in loaded.tokenizer.eos_ids:
                args.stop = [*args.stop, template.end.text]
        else:
            prompts = [encode_prompt(loaded, text, is_first=not args.session) for text in texts]
        for prompt_T in prompts:
            loaded.engine.check(prompt_T, session.tokens + args.max_tokens)
        if args.prompts:
            _print_all(args, loaded, session, prompts, sampling)
            return 0
        (prompt_T,) = prompts
        with progress.report_activity("prefilling the prompt (compiles on first use)"):
            session, _ = loaded.engine.read(session, prompt_T)
        if args.max_tokens:
            session = _generate(args, loaded, session, texts[0], prompt_T, sampling)
        if args.save_session:
            about = save_session(
                args.save_session,
                loaded.engine,
                session,
                model=loaded.model_fingerprint,
                tokenizer=loaded.tokenizer_fingerprint,
                precision=args.session_precision,
            )
            size = Path(args.save_session).stat().st_size
            error = f", {about.lost:.2%} of the weight changes lost" if about.lost else ""
            print(
                f"{args.save_session}: {about.tokens:,} tokens in {size:,} bytes{error}",
                file=sys.stderr,
            )
    return 0


def _check(args: argparse.Namespace) -> None:
    from tttjax.data.streams import check_unicode

    for name, low in (
        ("samples", 1),
        ("batch", 1),
        ("max_tokens", 0),
        ("seed", 0),
        ("max_length", 0),
    ):
        value = getattr(args, name)
        if value < low:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {low}.")
    if not args.save_session and args.session_precision != "float32":
        raise UserError("--session-precision applies to --save-session: add it.")
    if args.seed + args.samples > 2**32:
        raise UserError(f"--seed={args.seed} must be below {2**32 - args.samples + 1}.")
    if not args.max_tokens and not args.save_session:
        raise UserError(
            "--max-tokens=0 generates nothing: add --save-session to save the prefilled state."
        )
    if args.save_session and (args.samples > 1 or args.prompts):
        raise UserError("--save-session saves one text: remove it, or --samples and --prompts.")
    if args.chat and args.session:
        raise UserError("--chat begins a conversation, and --session continues a text: remove one.")
    if "" in args.stop:
        raise UserError("--stop is empty; give a non-empty string.")
    for stop in args.stop:
        check_unicode(stop, "--stop")


def _check_samples(samples: int, loaded: "LoadedModel") -> None:
    """Raises UserError if the logits and token counts of all samples exceed device memory."""
    from tttjax.runtime.memory import device_memory

    size, limit = samples * loaded.config.model.vocab_size * (4 + 1), device_memory()
    if size > limit:
        raise UserError(
            f"--samples={samples} need {size / 1e9:,.1f} GB for logits alone, but the device has "
            f"{limit / 1e9:,.1f} GB: use fewer samples, in several runs with different --seed."
        )


def _prompt(args: argparse.Namespace) -> str:
    from tttjax.data.streams import clean_text, read_text

    if args.prompt_file:
        return read_text(args.prompt_file)
    return clean_text(args.prompt or "", "--prompt")


def _print_all(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    session: "Session",
    prompts: "Sequence[np.ndarray]",
    sampling: Sampling,
) -> None:
    """Prints one JSON line per generated text."""
    from tttjax.runs.generation import generate_all

    requests = [
        (sampling, args.max_tokens, tuple(args.stop), args.seed + i) for i in range(args.samples)
    ]
    learn = args.learn == "all"
    for text in generate_all(loaded, session, prompts, requests, batch=args.batch, learn=learn):
        print(json.dumps(text, ensure_ascii=False), flush=True)


def _dim(text: str) -> str:
    """Dims the text on terminals that support it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def _generate(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    session: "Session",
    prompt: str,
    prompt_T: "np.ndarray",
    sampling: Sampling,
) -> "Session":
    """Generates and prints; returns the session after the first text.

    On a terminal, a single text is streamed after the dimmed prompt.
    """
    from tttjax.inference.generator import Generator, Request
    from tttjax.runs.generation import to_record

    requests = [
        Request(session, sampling, args.max_tokens, tuple(args.stop), args.seed + i, prompt_T)
        for i in range(args.samples)
    ]
    generator = Generator(loaded.engine, loaded.tokenizer, requests, learn=args.learn == "all")
    texts: list[list[GeneratedToken]] = [[] for _ in requests]
    streams = args.samples == 1 and not args.json
    on_terminal = streams and sys.stdout.isatty()
    with progress.report_activity("generating (compiles on first use)"):
        for token in generator:
            if on_terminal and not any(texts):  # the first token may have waited for compilation
                print(_dim(prompt), end="")
                progress.rename_activity("")  # a progress line would appear within the text
            texts[token.request].append(token)
            if streams:
                print(token.text, end="", flush=True)
    if streams:
        print()
    elif args.json:
        print(json.dumps([to_record(text) for text in texts], ensure_ascii=False))
    else:
        for i, text in enumerate(texts):
            print(f"--- {i + 1} (seed {args.seed + i})\n{''.join(token.text for token in text)}")
    return generator.sessions[0]
