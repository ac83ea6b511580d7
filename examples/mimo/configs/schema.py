"""Model configs: dataclasses that describe a whole model, without importing Megatron.

A `MimoConfig` holds a language model and a dict of modalities. A modality is an encoder, a
projector (see `modalities/base.py` for both) and the placeholder that stands for it in text.
A variant is a function that derives from another config with `dataclasses.replace`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from examples.mimo.modalities.values import bounds, check, check_divisible

if TYPE_CHECKING:
    from examples.mimo.modalities.base import EncoderConfig, ProjectorConfig

# Names that mean something else where modalities are told apart by name: a part of the model,
# Megatron's word for the text embeddings, and the fields of a data record.
RESERVED_NAMES = ("language", "text", "key", "conversations", "messages")

# Metadata of fields that two runs of one model may choose differently: no weight depends on them.
FREE = {"shapes_weights": False}


@dataclass(frozen=True)
class LanguageConfig:
    """A Llama-shaped GPT: RMSNorm, rotary positions, SwiGLU, grouped queries, no biases.

    `vocab_size` is the size of the embedding table; it must be divisible by the
    tensor-parallel size. `head_dim` is hidden_size / num_attention_heads when None.
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
    """One kind of input; `singular` names it in flags (`--image-path`) and messages."""

    singular: str
    placeholder: str
    token_id: int = field(metadata=bounds(0, 2**24))
    encoder: EncoderConfig
    projector: ProjectorConfig

    def __post_init__(self) -> None:
        for values in (self, self.encoder, self.projector):
            check(values)
        if not self.singular.isidentifier():
            raise ValueError(
                f"singular {self.singular!r} becomes part of a flag and of a variable's name: use "
                "letters, digits and underscores"
            )
        if not self.placeholder.strip():
            raise ValueError(f"{self.singular}: the placeholder is empty; write <{self.singular}>")


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
        for name, modality in self.modalities.items():
            if not name.isidentifier() or name in RESERVED_NAMES:
                raise ValueError(
                    f"{self.name}: a modality cannot be called {name!r}; use letters, digits and "
                    f"underscores, and none of {', '.join(RESERVED_NAMES)}"
                )
            if not 0 <= modality.token_id < self.language.vocab_size:
                raise ValueError(
                    f"{self.name}: token id {modality.token_id} of {name} is outside the "
                    f"vocabulary of {self.language.vocab_size}"
                )
            for other, item in self.modalities.items():
                if item.placeholder != modality.placeholder in item.placeholder:
                    raise ValueError(
                        f"{self.name}: {name}'s placeholder {modality.placeholder} is a part of "
                        f"{other}'s {item.placeholder}; choose another"
                    )
        for attribute in ("token_id", "placeholder", "singular"):
            owners: dict[Any, str] = {}
            for name, modality in self.modalities.items():
                value = getattr(modality, attribute)
                if value in owners:
                    same = f"{attribute.replace('_', ' ')} {value}"
                    raise ValueError(
                        f"{self.name}: {name} and {owners[value]} share {same}; give each its own"
                    )
                owners[value] = name
