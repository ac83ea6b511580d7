"""A checkpoint that nothing trained, whose answers are certain by construction.

The answer to any prompt is one of NUM_SENTENCES sentences of SENTENCE_LENGTH tokens and the
end-of-text token. Which one depends on the whole prompt, its pictures and its recordings; how a
sentence goes on depends on its last token alone. Behind the sentence of a model with an output
stands one of `spoken`; which one depends on everything before.

- A token's embedding is a row of signs, orthogonal for the tokens of sentences, and SIZE times as
  large as what layers add. The output row of a token is the signs of its predecessor in its
  sentence, so the right token's logit stands about GAIN * hidden_size above the others.
- The first tokens of all sentences follow the last token of the prompt alike. Its embedding is
  small, so what the layers make of the prompt decides between them, each along a direction of its
  own. So do the first codes of outputs follow the begin marker.
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


def spoken(config: MimoConfig) -> list[list[int]]:
    """The codes of all outputs that it ever puts out when it is greedy: one, two and three units.

    No code stands in two of them, or twice.
    """
    (output,) = config.outputs.values()
    unit = output.codec.unit
    codes = [iter(output.codec.allowed(position)) for position in range(unit)]
    return [[next(codes[n % unit]) for n in range(count * unit)] for count in (1, 2, 2, 3)]


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
    size, width = config.vocab_size, config.language.hidden_size
    signs = random.Random(0)
    embedding = torch.tensor(
        [[signs.choice((-1.0, 1.0)) for _ in range(width)] for _ in range(size)]
    )
    output = torch.zeros(size, width)
    rows = iter(_hadamard(width))
    (prompt_end,) = model.encode(config.chat.human.split("{}")[1])
    signs_of_end = next(rows)
    choosing = {prompt_end: signs_of_end}

    def follow(tokens: list[int], end: int) -> None:
        for token, following in zip(tokens, [*tokens[1:], end], strict=True):
            embedding[token] = next(rows)
            output[following] += embedding[token]

    modality = next(iter(config.outputs.values()), None)
    end = modality.begin_id if modality else model.eos_id()
    for tokens in _sentences(model):
        output[tokens[0]] = signs_of_end + CHOICE * next(rows)
        follow(tokens, end)
    # All sentences end with it, so the layers' part of its logit is large; no answer is empty.
    output[end] -= 3 * signs_of_end
    if modality:
        choosing[modality.begin_id] = next(rows)
        for codes in spoken(config):
            tokens = [modality.first_id + code for code in codes]
            output[tokens[0]] = choosing[modality.begin_id] + CHOICE * next(rows)
            follow(tokens, modality.end_id)
        follow([modality.end_id], model.eos_id())
    embedding *= SIZE
    for token, signs_of_token in choosing.items():
        embedding[token] = SMALL_SIZE * signs_of_token
    return embedding, GAIN * output


def _hadamard(size: int) -> torch.Tensor:
    """(size, size) signs in orthogonal rows, for a power of two (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    assert len(matrix) == size, f"{size} is no power of two"
    return matrix
