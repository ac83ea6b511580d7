"""Model configs: dataclasses that describe a whole model, without importing Megatron.

A `MimoConfig` holds a language model and a dict of modalities. What the model takes in has an
encoder and a projector, what it puts out a codec (see `modalities/base.py` for all three); a
placeholder stands for either in text. A variant is a function that derives from another config
with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from examples.mimo.modalities.values import (
    bounds,
    check,
    check_divisible,
    check_modalities,
)

if TYPE_CHECKING:
    import torch

    from examples.mimo.modalities.base import CodecConfig, EncoderConfig, ProjectorConfig
    from examples.mimo.modalities.files import Source

# Metadata of fields that two runs of one model may choose differently: no weight depends on them.
FREE = {"shapes_weights": False}

# With codes in it a vocabulary is a multiple of this, which tensor-parallel sizes divide.
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class LanguageConfig:
    """A Llama-shaped GPT: RMSNorm, rotary positions, SwiGLU, grouped queries, no biases.

    `vocab_size` is the size of the text's vocabulary, and of the embedding table unless the model
    has outputs; it must be divisible by the tensor-parallel size. `head_dim` is hidden_size /
    num_attention_heads when None.
    `rope_scaling_factor` stretches rotary positions as Llama 3 does, from 8,192 positions.
    `qkv_bias` and `qk_norm` are what Qwen2 and Qwen3 add.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int = field(metadata=FREE)
    rotary_base: int = field(default=10000, metadata=bounds(100, 10**9))
    norm_epsilon: float = field(default=1e-5, metadata=bounds(1e-12, 1e-2))
    tie_embeddings: bool = False
    init_method_std: float = field(default=0.02, metadata=FREE | bounds(0, 1))
    head_dim: int | None = field(default=None, metadata=bounds(2, 4096))
    rope_scaling_factor: float | None = field(default=None, metadata=bounds(1, 1024))
    qkv_bias: bool = False
    qk_norm: bool = False

    # As of `EncoderConfig`.
    hf_families: ClassVar[str | None] = "examples.mimo.hf.families:LANGUAGE"

    def __post_init__(self) -> None:
        check(self)
        check_divisible(self, "num_attention_heads", "num_query_groups")
        if self.head_dim is None:
            check_divisible(self, "hidden_size", "num_attention_heads")

    @property
    def query_projection_size(self) -> int:
        """The width of all query heads together."""
        return self.num_attention_heads * self.kv_projection_size // self.num_query_groups

    @property
    def kv_projection_size(self) -> int:
        """The width of all key groups together; the values' is the same."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_query_groups * head_dim


@dataclass(frozen=True)
class ModalityConfig:
    """One kind of input or output; `singular` names it in flags (`--image-path`) and messages.

    With an encoder and a projector users show it to the model: the placeholder in their text
    becomes a run of `token_id`, one for each embedding. With a codec the model answers with it: the
    placeholder in an answer becomes codes. It may have both.
    """

    singular: str
    placeholder: str
    token_id: int | None = field(default=None, metadata=bounds(0, 2**24))
    encoder: EncoderConfig | None = None
    projector: ProjectorConfig | None = None
    codec: CodecConfig | None = None

    def __post_init__(self) -> None:
        for values in filter(None, (self, self.encoder, self.projector, self.codec)):
            check(values)
        if not self.singular.isidentifier():
            raise ValueError(
                f"singular {self.singular!r} becomes part of a flag and of a variable's name: use "
                "letters, digits and underscores"
            )
        if not self.placeholder.strip():
            raise ValueError(f"{self.singular}: the placeholder is empty; write <{self.singular}>")
        is_given = [part is not None for part in (self.encoder, self.projector, self.token_id)]
        if any(is_given) != all(is_given) or not (self.encoder or self.codec):
            raise ValueError(
                f"{self.singular}: an input needs encoder, projector and token_id, an output a "
                "codec; give a modality one of the two or both"
            )


@dataclass(frozen=True)
class InputModality:
    """The side of a modality that the model takes in."""

    singular: str
    placeholder: str
    token_id: int
    encoder: EncoderConfig
    projector: ProjectorConfig

    def tokens_of(self, inputs: dict[str, torch.Tensor]) -> list[int]:
        """The placeholders of an item that became these encoder inputs."""
        return [self.token_id] * self.encoder.num_tokens(inputs)


@dataclass(frozen=True)
class OutputModality:
    """The side of a modality that the model puts out: a range of token ids.

    An output is the token `begin_id`, codes, of which code 0 is the token `first_id`, and `end_id`.
    """

    singular: str
    placeholder: str
    codec: CodecConfig
    begin_id: int
    encoder: EncoderConfig | None = None

    @property
    def end_id(self) -> int:
        """The token behind the codes."""
        return self.begin_id + 1

    @property
    def first_id(self) -> int:
        """The token of code 0."""
        return self.begin_id + 2

    @property
    def ids(self) -> range:
        """Markers and codes."""
        return range(self.begin_id, self.first_id + self.codec.num_codes)

    def allowed(self, position: int) -> range:
        """The codes that may stand at this position of an output, none where it must end.

        ValueError, one line, where the codec's own code fails or names codes that there are not.
        """
        where = f"{self.singular}: {type(self.codec).__name__}.allowed({position})"
        try:
            codes = self.codec.allowed(position)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{where} failed: {reason}") from error
        least, most = sorted((codes[0], codes[-1])) if codes else (0, 0)
        if least < 0 or most >= self.codec.num_codes:
            raise ValueError(
                f"{where} holds codes {least} to {most}, but there are {self.codec.num_codes}"
            )
        return codes

    def read(self, source: Source) -> Any:
        """A decoded file, as the codec takes it."""
        return (self.encoder or self.codec).read(source)

    def tokens_of(self, source: Source) -> list[int]:
        """The tokens of an output that is in a file; ValueError, one line, if there are none."""
        # Loads torch, which a config does without.
        from examples.mimo.modalities.base import CodedItem

        if isinstance(source, CodedItem):
            return self.tokens(source.codes)
        return self.tokens(self.codec.encode(self.read(source)))

    def tokens(self, codes: Sequence[int]) -> list[int]:
        """Codes between their markers; ValueError, one line, for codes that are no output."""
        codes = list(map(operator.index, codes))
        self.codec.check_codes(codes)
        return [self.begin_id, *(self.first_id + code for code in codes), self.end_id]


@dataclass(frozen=True)
class ChatTemplate:
    """The text around the turns of a conversation; `{}` is where a turn's own text goes.

    `system` begins a conversation that has no system turn of its own, `system_turn` stands around
    one. `start` begins an answer: a prompt ends with it. Before earlier answers stands `past_start`
    where that is not None. `between` follows an answer's end-of-text token when another turn comes.
    """

    system: str = ""
    human: str = "{}\n"
    answer: str = "{}"
    between: str = ""
    system_turn: str = "{}\n"
    start: str = ""
    past_start: str | None = None

    def __post_init__(self) -> None:
        check(self)
        for name in ("human", "answer", "system_turn"):
            if getattr(self, name).count("{}") != 1:
                raise ValueError(
                    f"chat template: {name}={getattr(self, name)!r} must hold {{}} exactly once"
                )

    def around(self, role: str) -> list[str]:
        """The text before and after a turn of `role`: system, user or assistant."""
        turns = {"system": self.system_turn, "user": self.human, "assistant": self.answer}
        return turns[role].split("{}")

    def answer_start(self, is_last: bool) -> str:
        """The text that begins the last answer of a conversation, or an earlier one."""
        return self.start if is_last or self.past_start is None else self.past_start


@dataclass(frozen=True)
class MimoConfig:
    """A whole model. `name` is its entry in the registry; `prompt` is asked when none is given.

    `frozen` names the parts that do not train unless `--freeze` says otherwise.
    """

    name: str = field(metadata=FREE)
    language: LanguageConfig
    # Encoders run in this order.
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    chat: ChatTemplate = ChatTemplate()
    prompt: str = field(default="", metadata=FREE)
    add_bos: bool = True
    frozen: tuple[str, ...] = field(default=(), metadata=FREE)

    def __post_init__(self) -> None:
        check(self)
        check_modalities(self.name, self.modalities, self.language.vocab_size)
        check(self.built_language)  # with all codes in it

    @cached_property
    def inputs(self) -> dict[str, InputModality]:
        """What the model takes: the modalities with an encoder."""
        return {
            name: InputModality(m.singular, m.placeholder, m.token_id, m.encoder, m.projector)
            for name, m in self.modalities.items()
            if m.encoder and m.projector and m.token_id is not None
        }

    @cached_property
    def outputs(self) -> dict[str, OutputModality]:
        """What the model puts out: the modalities with a codec, their ids behind the text's."""
        outputs: dict[str, OutputModality] = {}
        begin_id = self.language.vocab_size
        for name, m in self.modalities.items():
            if m.codec:
                output = OutputModality(m.singular, m.placeholder, m.codec, begin_id, m.encoder)
                outputs[name], begin_id = output, output.ids.stop
        return outputs

    @cached_property
    def built_language(self) -> LanguageConfig:
        """The language model as it is built: its vocabulary is the text's tokens and all codes."""
        if not self.outputs:
            return self.language
        end = max(output.ids.stop for output in self.outputs.values())
        rounded = -(-end // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        return dataclasses.replace(self.language, vocab_size=rounded)

    @property
    def vocab_size(self) -> int:
        """The size of the embedding table."""
        return self.built_language.vocab_size
