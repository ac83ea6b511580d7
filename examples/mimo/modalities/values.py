"""What a config's fields may hold, and which of an encoder's inputs stay on the host.

Configs are built from files, flags and JSON of elsewhere. A field's type is its annotation; its
bounds stand beside it (`field(metadata=bounds(1, 8))`) or follow from its type, so that every
field of every config has some. They leave room for any model there is, and none for a number that
cannot be meant, or that would allocate terabytes.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Of whole numbers: more than any vocabulary, sequence or side of a picture.
MOST_INT = 2**24
MOST_FLOAT = 1e6
MAX_CHARACTERS = 65_536
MAX_ITEMS = 1_024

# Sizes that configs of all kinds have.
SIZES = {
    "num_layers": (1, 1_024),
    "hidden_size": (1, 2**17),
    "ffn_hidden_size": (1, 2**20),
    "num_attention_heads": (1, 4_096),
    "num_query_groups": (1, 4_096),
    "patch_size": (1, 4_096),
    "num_channels": (1, 4_096),
}


# Names that mean something else where modalities are told apart by name: a part of the model,
# Megatron's word for the text embeddings, and the fields of a data record.
RESERVED_NAMES = ("language", "text", "key", "conversations", "messages")


def bounds(least: float, most: float) -> dict[str, tuple[float, float]]:
    """Metadata of a dataclass field whose numbers lie between these, both included."""
    return {"bounds": (least, most)}


@dataclass(frozen=True)
class Rule:
    """What one field may hold: the resolved annotation (None where it is unknown), and bounds."""

    kind: Any
    least: float
    most: float
    choices: tuple[Any, ...] | None = None

    def accepts(self, value: Any) -> bool:
        """Whether the field may hold `value`."""
        if self.choices is not None:
            return type(value) is type(self.choices[0]) and value in self.choices
        return self._accepts(self.kind, value)

    def _accepts(self, kind: Any, value: Any) -> bool:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is bool or kind is type(None):
            return isinstance(value, kind)
        if kind in (int, float):
            # A bool is an int to Python, and an int is as good as a float.
            numbers = (int,) if kind is int else (int, float)
            is_number = isinstance(value, numbers) and not isinstance(value, bool)
            # Not-a-number is between no two numbers.
            return is_number and self.least <= value <= self.most
        if kind is str:
            return isinstance(value, str) and len(value) <= MAX_CHARACTERS
        if origin is typing.Literal:
            return any(type(value) is type(item) and value == item for item in arguments)
        if origin in (typing.Union, types.UnionType):
            return any(self._accepts(item, value) for item in arguments)
        if origin is tuple:
            if not isinstance(value, tuple) or len(value) > MAX_ITEMS:
                return False
            kinds = _kinds_of_items(arguments, value)
            return len(kinds) == len(value) and all(map(self._accepts, kinds, value))
        outer = origin or kind
        return isinstance(value, outer) if isinstance(outer, type) else True

    def normal(self, value: Any) -> Any:
        """An accepted value with the type that is declared: JSON writes 1 for 1.0."""
        return self._normal(self.kind, value)

    def _normal(self, kind: Any, value: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is float:
            return float(value)
        if origin in (typing.Union, types.UnionType):
            return self._normal(next(k for k in arguments if self._accepts(k, value)), value)
        if origin is tuple:
            return tuple(map(self._normal, _kinds_of_items(arguments, value), value))
        return value

    @property
    def needed(self) -> str:
        """What the field may hold, in words."""
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        return self._needed(self.kind)

    def _needed(self, kind: Any) -> str:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is int:
            return f"a whole number from {self.least:,.0f} to {self.most:,.0f}"
        if kind is float:
            return f"a number from {self.least:g} to {self.most:g}"
        if kind is str:
            return f"text of at most {MAX_CHARACTERS:,} characters"
        if kind in (bool, type(None)):
            return "true or false" if kind is bool else "none"
        if origin is typing.Literal:
            return f"one of {', '.join(map(repr, arguments))}"
        if origin in (typing.Union, types.UnionType):
            return " or ".join(map(self._needed, arguments))
        if origin is tuple and arguments[-1] is Ellipsis:
            return f"a list of {self._needed(arguments[0])}"
        if origin is tuple:
            needed = dict.fromkeys(map(self._needed, arguments))
            return (
                f"a list of {len(arguments)}, {'each' * (len(needed) == 1)} {' and '.join(needed)}"
            )
        return getattr(origin or kind, "__name__", str(kind))


def _kinds_of_items(arguments: tuple[Any, ...], value: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments


_rules: dict[type, dict[str, Rule]] = {}


def rules(config_class: type) -> dict[str, Rule]:
    """The rule of each field of a dataclass."""
    if config_class not in _rules:
        fields = dataclasses.fields(config_class)
        _rules[config_class] = {field.name: _rule(config_class, field) for field in fields}
    return _rules[config_class]


def _rule(config_class: type, field: dataclasses.Field) -> Rule:
    kind = field_type(config_class, field.name)
    default = field.default if isinstance(field.default, int) else None
    if "bounds" in field.metadata:
        least, most = field.metadata["bounds"]
    elif field.name in SIZES:
        least, most = SIZES[field.name]
    elif _numbers_in(kind) == {int}:
        # A size or a count is at least 1, unless the field's own default says otherwise.
        least, most = min(1, 1 if default is None else default), MOST_INT
    else:
        least, most = 0.0, MOST_FLOAT
    return Rule(kind, least, most, field.metadata.get("choices"))


def _numbers_in(kind: Any) -> set[type]:
    """The kinds of numbers that an annotation names."""
    if kind in (int, float):
        return {kind}
    return {number for inner in typing.get_args(kind) for number in _numbers_in(inner)}


def field_type(config_class: type, name: str) -> Any:
    """The declared type of a field; None where only type checkers can resolve it."""
    owner = next(c for c in config_class.__mro__ if name in inspect.get_annotations(c))
    alone = types.SimpleNamespace(__annotations__={name: owner.__annotations__[name]})
    module = sys.modules.get(owner.__module__)
    try:
        return typing.get_type_hints(alone, vars(module) if module else {})[name]
    except NameError:
        return None


def check(config: Any) -> None:
    """ValueError, one line, unless every field of the dataclass `config` keeps its rule.

    Lists become tuples, and whole numbers floats where a field says so: JSON knows no difference.
    """
    for name, rule in rules(type(config)).items():
        value = as_tuples(getattr(config, name))
        if not rule.accepts(value):
            verb = "choose" if rule.choices is not None else "it must be"
            raise ValueError(f"{name} is {shown(value)}; {verb} {rule.needed}")
        object.__setattr__(config, name, rule.normal(value))


def check_divisible(config: Any, name: str, divisor: str) -> None:
    """ValueError unless one field is a multiple of another."""
    size, parts = getattr(config, name), getattr(config, divisor)
    if size % parts:
        raise ValueError(
            f"{name} {size} is not divisible by {divisor} {parts}; choose a multiple of {parts}"
        )


def check_modalities(model: str, modalities: Mapping[str, Any], vocab_size: int) -> None:
    """ValueError, one line, unless a model's modalities can be told apart by all they are called.

    `vocab_size` is that of the text, in which their placeholders' tokens lie.
    """
    for name, modality in modalities.items():
        if not name.isidentifier() or name in RESERVED_NAMES:
            raise ValueError(
                f"{model}: a modality cannot be called {name!r}; use letters, digits and "
                f"underscores, and none of {', '.join(RESERVED_NAMES)}"
            )
        if modality.token_id is not None and modality.token_id >= vocab_size:
            raise ValueError(
                f"{model}: token id {modality.token_id} of {name} is outside the vocabulary of "
                f"{vocab_size}"
            )
        for other, item in modalities.items():
            if item.placeholder != modality.placeholder in item.placeholder:
                raise ValueError(
                    f"{model}: {name}'s placeholder {modality.placeholder} is a part of {other}'s "
                    f"{item.placeholder}; choose another"
                )
    for attribute in ("token_id", "placeholder", "singular"):
        owners: dict[Any, str] = {}
        for name, modality in modalities.items():
            value = getattr(modality, attribute)
            if value is not None and value in owners:
                same = f"{attribute.replace('_', ' ')} {value}"
                raise ValueError(
                    f"{model}: {name} and {owners[value]} share {same}; give each its own"
                )
            owners[value] = name


def as_tuples(value: Any) -> Any:
    """`value` with every list in it as a tuple."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as a message quotes it, shortened where it is long."""
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_count(name: str) -> bool:
    """Whether an encoder input is read by the host, on which it then stays: `num_...`."""
    return name.startswith("num_")


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a host's tensor on `device`, which a GPU makes while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
