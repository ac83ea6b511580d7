"""python examples/mimo/avlm_inference.py --ckpt DIR --image-path FILE --audio-path FILE

Answers a prompt about a picture and a recording. All else it needs is in the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from examples.mimo.cli import command

if TYPE_CHECKING:
    from examples.mimo.configs.schema import MimoConfig
    from examples.mimo.generation.api import Answerer
    from examples.mimo.generation.scheduler import Options


def main() -> None:
    """Parse, load, answer."""
    parser = _parser()
    args, rest = parser.parse_known_args()
    command.prepare_environment()
    command.alone_unless_launched()
    from examples.mimo import compat

    compat.install()
    terminal = sys.stdout
    with command.stdout_to(os.devnull):
        answer(args, rest, parser, terminal)


def answer(
    args: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser, terminal: TextIO
) -> None:
    """Load the model, and answer what the flags ask, on `terminal` or in a file."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.generation.api import Answerer

    checkpoint = open_checkpoint(args.ckpt)
    files, config = _media_flags(checkpoint.config, rest, parser)
    options = _options(args)
    prompt = _check(args, files, config)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    answerer = Answerer(checkpoint, args.tp, args.pp, graphs=args.cuda_graphs)
    if args.interactive:
        from examples.mimo.generation.chat import ChatSession

        ChatSession(answerer, options, terminal).run(sys.stdin)
    elif args.input:
        from examples.mimo.generation.batch_file import answer_file

        answer_file(answerer, args.input, args.output, options, args.samples, args.batch_size)
    else:
        _answer_once(answerer, prompt, files, options, args, terminal)


def _answer_once(
    answerer: Answerer,
    prompt: str,
    files: dict[str, list[Path]],
    options: Options,
    args: argparse.Namespace,
    terminal: TextIO,
) -> None:
    from examples.mimo.generation.api import Request, share
    from examples.mimo.generation.batch_file import answer_fields

    sample = share(lambda: answerer.read(Request(prompt, files)))
    speaks = os.environ["RANK"] == "0"
    if args.stream:
        for piece in answerer.stream(sample, options):
            if speaks:
                print(piece.text, end="", file=terminal, flush=True)
        if speaks:
            print(file=terminal)
        return
    answers = answerer.answer([sample] * args.samples, options, args.batch_size)
    names = {name: [str(f) for f in given] for name, given in files.items()}
    for found in answers if speaks else ():
        asked = {"prompt": prompt, **names, **answer_fields(found)}
        print(json.dumps(asked, ensure_ascii=False) if args.json else found.text, file=terminal)


def _options(args: argparse.Namespace) -> Options:
    from examples.mimo.generation.sampling import Sampling
    from examples.mimo.generation.scheduler import Options

    values = vars(args)
    try:
        sampling = Sampling(**{f.name: values[f.name] for f in dataclasses.fields(Sampling)})
        logprobs = {"logprobs": args.logprobs, "prompt_logprobs": args.logprobs}
        return Options(args.max_new_tokens, sampling, tuple(args.stop), **logprobs)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None


def _check(args: argparse.Namespace, files: dict[str, list[Path]], config: MimoConfig) -> str:
    """The prompt; ValueError for flags that do not go together."""
    if args.samples < 1 or args.batch_size < 1:
        raise ValueError(f"--samples {args.samples} --batch-size {args.batch_size}: at least 1")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples {args.samples} are all alike without --temperature")
    if bool(args.input) != bool(args.output):
        raise ValueError("--input and --output go together: questions and answers, as JSON lines")
    alone = args.input or args.interactive
    given = [f"--{config.modalities[name].singular}-path" for name, of in files.items() if of]
    given += [f"--{name}" for name in ("prompt", "json", "stream") if getattr(args, name)]
    if alone and given:
        other = "--input" if args.input else "--interactive"
        raise ValueError(f"{given[0]} does not go with {other}")
    if args.input and args.interactive:
        raise ValueError("--input does not go with --interactive")
    if args.stream and (args.json or args.samples > 1):
        raise ValueError("--stream shows the text of one answer; leave out --json and --samples")
    if args.logprobs and not (args.json or args.input):
        raise ValueError("--logprobs needs --json or --input")
    prompt = config.prompt if args.prompt is None else args.prompt
    if not alone and not prompt.strip() and not any(files.values()):
        raise ValueError("nothing to answer: give --prompt or a file")
    return prompt


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="avlm_inference.py",
        allow_abbrev=False,
        description="Answer a prompt about pictures and recordings.",
        epilog="Each modality of the checkpoint has a flag for its files, --NOUN-path: "
        "--image-path FILE and --audio-path FILE for the models of this package. Repeat it for "
        "several files; in the prompt, <image> and <audio> say where they go (else in front). "
        "--audio-overflow truncate cuts a recording that is too long.",
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    add("--prompt", help="default: the prompt in the model's config")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--tp", type=int, default=1, help="tensor-parallel size, under torchrun")
    add("--pp", type=int, default=1, help="pipeline stages, under torchrun")
    add("--cuda-graphs", action="store_true", help="one launch a token instead of hundreds")
    how = parser.add_argument_group("how the answer is given")
    add = how.add_argument
    add("--json", action="store_true", help="print a JSON object for each answer")
    add("--logprobs", action="store_true", help="log-probabilities of prompt and answer in it")
    add("--stream", action="store_true", help="show the answer as it comes")
    add("--interactive", action="store_true", help="a conversation: lines of stdin are turns")
    add("--input", type=Path, metavar="FILE", help="questions, a JSON object a line")
    add("--output", type=Path, metavar="FILE", help="their answers; goes on where it was")
    add("--batch-size", type=int, default=16, metavar="N", help="answers at once, default 16")
    choice = parser.add_argument_group("how its tokens are chosen")
    add = choice.add_argument
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int, default=0, metavar="N", help="only the N most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="the fewest with probability P")
    add("--min-p", type=float, default=0.0, metavar="P", help="with P of the likeliest one's")
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="on tokens there are")
    add("--seed", type=int, default=0, help="the same seed gives the same answer, at any layout")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeat it")
    add("--samples", type=int, default=1, metavar="N", help="so many answers to each prompt")
    return parser


def _media_flags(
    config: MimoConfig, rest: list[str], parser: argparse.ArgumentParser
) -> tuple[dict[str, list[Path]], MimoConfig]:
    """The files of each modality, and the config with the overflow flags laid over it."""
    for modality in config.modalities.values():
        singular = modality.singular
        parser.add_argument(f"--{singular}-path", type=Path, action="append", default=[])
        if hasattr(modality.encoder, "overflow"):
            parser.add_argument(f"--{singular}-overflow", choices=("error", "truncate"))
    given = vars(parser.parse_args())
    modalities = {}
    for name, modality in config.modalities.items():
        overflow = given.get(f"{modality.singular}_overflow")
        if overflow:
            encoder = dataclasses.replace(modality.encoder, overflow=overflow)  # type: ignore[call-arg]
            modality = dataclasses.replace(modality, encoder=encoder)
        modalities[name] = modality
    files = {name: given[f"{m.singular}_path"] for name, m in modalities.items()}
    return files, dataclasses.replace(config, modalities=modalities)


if __name__ == "__main__":
    command.run("avlm_inference.py", main)
