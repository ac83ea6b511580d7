"""A checkpoint that nothing trained, whose answers are certain by construction.

The answer to any prompt is one of NUM_SENTENCES sentences of SENTENCE_LENGTH tokens and the
end-of-text token. Which one depends on the whole prompt, its pictures and its recordings; how a
sentence goes on depends on its last token alone.

- A token's embedding is a row of signs, orthogonal for the tokens of sentences, and SIZE times as
  large as what layers add. The output row of a token is the signs of its predecessor in its
  sentence, so the right token's logit stands about GAIN * hidden_size above the others.
- The first tokens of all sentences follow the last token of the prompt alike. Its embedding is
  small, so what the layers make of the prompt decides between them, each along a direction of its
  own.
- All other weights are random. Those of linear layers are scaled to keep the size of their
  inputs, so that attention, MLPs, encoders and projectors matter.
"""

import random
from pathlib import Path

import sentencepiece
import torch

from examples.mimo.checkpoint.description import RELEASE, TRACKER, save_description
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.hf import io
from examples.mimo.hf.from_hf import initialize_single_process, sharded_state
from examples.mimo.model.parts import part_names

NUM_SENTENCES, SENTENCE_LENGTH = 8, 12
# Sampling at temperature 1 leaves the sentence now and then, at 2 at almost every token.
GAIN = 0.07
SIZE, SMALL_SIZE = 3.0, 0.4
# How much more than a continuation's the direction of a sentence weighs.
CHOICE = 2.0
EMBEDDING, OUTPUT = "word_embeddings.weight", "output_layer.weight"


def write_checkpoint(config: MimoConfig, data: Path, folder: Path, spoiled: str = "") -> None:
    """Such a model of the sizes of `config`, with the tokenizer of `data`, in `folder`.

    The embeddings of the tokens of `spoiled` are NaN, and so are the logits behind them.
    """
    initialize_single_process(seed=1)
    embedding, output = _vocabulary(config, data / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    embedding[model.encode(spoiled)] = float("nan")
    chunks, objects = [], []
    for part in part_names(config):
        tensors, others = sharded_state(config, part, "cpu")
        objects += others
        for key, pieces in tensors.items():
            for piece in pieces:
                weight = piece.data.detach()
                if key.endswith(EMBEDDING):
                    weight = embedding
                elif key.endswith(OUTPUT):
                    weight = output
                elif ".linear_" in key and weight.dim() == 2:
                    weight = weight / (weight.std() * weight.shape[1] ** 0.5)
                shape = (*[1] * piece.prepend_axis_num, *piece.local_shape)
                where = key, tuple(piece.global_offset), shape, tuple(piece.global_shape)
                chunks.append(io.Chunk(*where, weight.dtype, lambda weight=weight: weight))
    (folder / RELEASE).mkdir(parents=True)
    io.write_checkpoint(folder / RELEASE, chunks, objects)
    save_description(folder, config, data)
    (folder / TRACKER).write_text(RELEASE)


def sentences(data: Path) -> list[str]:
    """All that the model ever says when it is greedy."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    return [model.decode(tokens) for tokens in _sentences(model)]


def _sentences(model: sentencepiece.SentencePieceProcessor) -> list[list[int]]:
    """Different pieces of two letters and more; no sentence begins with a space."""
    pieces = {
        i: model.id_to_piece(i)
        for i in range(model.vocab_size())
        if not (model.is_byte(i) or model.is_control(i) or model.id_to_piece(i).startswith("<"))
    }
    words = [i for i, piece in pieces.items() if len(piece.removeprefix("▁")) > 1]
    first = [i for i in words if not pieces[i].startswith("▁")][:NUM_SENTENCES]
    others = iter(i for i in words if i not in first)
    return [[start, *(next(others) for _ in range(SENTENCE_LENGTH - 1))] for start in first]


def _vocabulary(config: MimoConfig, tokenizer: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings and the output layer, (V, H) each."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    size, width = config.language.vocab_size, config.language.hidden_size
    signs = random.Random(0)
    embedding = torch.tensor(
        [[signs.choice((-1.0, 1.0)) for _ in range(width)] for _ in range(size)]
    )
    output = torch.zeros(size, width)
    rows = iter(_hadamard(width))
    (prompt_end,) = model.encode(config.chat.human.split("{}")[1])
    signs_of_end = next(rows)
    for tokens in _sentences(model):
        output[tokens[0]] = signs_of_end + CHOICE * next(rows)
        for token, following in zip(tokens, [*tokens[1:], model.eos_id()], strict=True):
            embedding[token] = next(rows)
            output[following] += embedding[token]
    # All sentences end with it, so the layers' part of its logit is large; no answer is empty.
    output[model.eos_id()] -= 3 * signs_of_end
    embedding *= SIZE
    embedding[prompt_end] = SMALL_SIZE * signs_of_end
    return embedding, GAIN * output


def _hadamard(size: int) -> torch.Tensor:
    """(size, size) signs in orthogonal rows, for a power of two (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    assert len(matrix) == size, f"{size} is no power of two"
    return matrix
