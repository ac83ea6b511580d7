"""Answers a prompt about a picture and a recording.

python examples/mimo/avlm_inference.py --ckpt DIR --image-path FILE --audio-path FILE

Everything else it needs is in the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

from examples.mimo.cli import command
from examples.mimo.cli.overrides import (
    check_flags,
    inference_parser,
    media_paths,
    options_from_flags,
    output_paths,
    parse_with_modalities,
    with_modality_flags,
)

if TYPE_CHECKING:
    from examples.mimo.generation.api import Mimo
    from examples.mimo.generation.sampling import Options


def main() -> None:
    """Parse the flags and answer, with everything but answers kept off stdout."""
    parser = inference_parser()
    # Which flags there are for files depends on the checkpoint, so the rest is parsed after it.
    known = parser.parse_known_args()[0]
    command.prepare_environment()
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    stdout = sys.stdout  # for answers alone; what libraries print goes nowhere
    with command.stdout_to(os.devnull):
        answer(known, parser, stdout)


def answer(known: argparse.Namespace, parser: argparse.ArgumentParser, stdout: TextIO) -> None:
    """Load the model and answer in the way that the flags ask for."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.generation.api import Mimo

    checkpoint = open_checkpoint(known.ckpt, verify=known.verify_integrity)
    args = parse_with_modalities(parser, checkpoint.config)
    options = options_from_flags(args, checkpoint.config)
    prompt = check_flags(args, checkpoint.config)
    config = with_modality_flags(checkpoint.config, args)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    model = Mimo(checkpoint, args.tp, args.pp, cuda_graphs=args.cuda_graphs)
    if args.interactive:
        from examples.mimo.generation.sessions import ChatSession

        ChatSession(model, options, stdout, output_paths(model.config, args)).run(sys.stdin)
    elif args.input:
        from examples.mimo.generation.sessions import answer_file

        answer_file(model, args.input, args.output, options, args.samples, args.batch_size)
    else:
        answer_prompt(model, prompt, options, args, stdout)


def answer_prompt(
    model: Mimo, prompt: str, options: Options, args: argparse.Namespace, stdout: TextIO
) -> None:
    """Answer one prompt about the files of the flags; rank 0 prints."""
    from examples.mimo.data.turns import prompt_content
    from examples.mimo.generation.api import on_rank_zero
    from examples.mimo.generation.sessions import answer_fields, save_as

    paths = media_paths(model.config, args)
    content = prompt_content(prompt, paths, model.config)
    record = {"key": "prompt", "conversations": [{"role": "user", "content": content}], **paths}
    sample = on_rank_zero(lambda: model.encode(record))
    is_rank_zero = os.environ["RANK"] == "0"
    if args.stream:
        for piece in model.stream_answer(sample, options):
            if is_rank_zero:
                print(piece.text, end="", file=stdout, flush=True)
        if is_rank_zero:
            print(file=stdout)
        answers = [piece.answer] if piece.answer else []
    else:
        # Every rank generates; one prints.
        answers = model.answer([sample] * args.samples, options, args.batch_size)
    names = {name: [str(path) for path in files] for name, files in paths.items()}
    for number, result in enumerate(answers):
        files: dict[str, list[str]] = {}
        try:
            for name, path in output_paths(model.config, args).items():
                files |= save_as(model, result, name, path, number if args.samples > 1 else None)
        finally:  # what cannot be written takes no text with it
            fields = {"prompt": prompt, **names, **answer_fields(result, files)}
            line = json.dumps(fields, ensure_ascii=False, allow_nan=False)
            if is_rank_zero and not args.stream:
                print(line if args.json else result.text, file=stdout)


if __name__ == "__main__":
    command.run("avlm_inference.py", main)
