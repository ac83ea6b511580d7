"""`--set`: values are of the type that a field declares, whatever the field is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from examples.mimo.cli.overrides import with_fields
from examples.mimo.modalities.image import VitConfig


@dataclass(frozen=True)
class EveryKind(VitConfig):
    """An encoder with a field of every type that can be set."""

    flag: bool = True
    ratio: float = 0.5
    limit: int | None = 3
    sizes: tuple[int, ...] = (1, 2)
    window: tuple[int, float] = (1, 0.5)
    mode: str = field(default="fast", metadata={"choices": ("fast", "exact")})
    order: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit > max(self.sizes, default=0) + 10:
            raise ValueError(f"limit {self.limit} is far above sizes {self.sizes}")


@pytest.fixture(scope="module")
def config(tiny):
    images = tiny.modalities["images"]
    encoder = EveryKind(**{f.name: getattr(images.encoder, f.name) for f in fields(images.encoder)})
    images = dataclasses.replace(images, encoder=encoder)
    return dataclasses.replace(tiny, modalities={**tiny.modalities, "images": images})


def fields(value):
    return dataclasses.fields(value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("flag=False", False),
        ("flag=no", False),
        ("flag=0", False),
        ("flag=TRUE", True),
        ("flag=yes", True),
        ("ratio=2", 2.0),
        ("limit=7", 7),
        ("limit=none", None),
        ("sizes=", ()),
        ("sizes=4,5,6", (4, 5, 6)),
        ("window=3,0.25", (3, 0.25)),
        ("mode=exact", "exact"),
        ("order=last", "last"),
        ("num_layers=5", 5),
    ],
)
def test_a_value_is_of_the_fields_type(config, assignment, expected):
    encoder = with_fields(config, [f"images.encoder.{assignment}"]).modalities["images"].encoder
    value = getattr(encoder, assignment.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("flag=maybe", "'maybe' is not of type bool (true or false)"),
        ("flag=", "'' is not of type bool"),
        ("num_layers=1.5", "'1.5' is not of type int"),
        ("num_layers=none", "'none' is not of type int"),
        ("limit=few", "'few' is not of type int | None"),
        ("sizes=1,b", "'1,b' is not of type tuple[int, ...]"),
        ("window=1", "'1' is not of type tuple[int, float]"),
        ("window=1,2,3", "'1,2,3' is not of type tuple[int, float]"),
        ("mode=slow", "choose one of fast, exact"),
        ("order=middle", "'middle' is not of type Literal['first', 'last']"),
        ("mode.inner=1", "mode is a value and holds no fields"),
        ("limit=99", "limit 99 is far above sizes (1, 2)"),
    ],
)
def test_what_is_not_of_the_fields_type_is_refused(config, assignment, message):
    with pytest.raises(ValueError, match=r"^--set images\.encoder\.") as error:
        with_fields(config, [f"images.encoder.{assignment}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_that_need_each_other_are_set_at_once(config):
    assignments = ["images.encoder.limit=99", "images.encoder.sizes=200"]
    encoder = with_fields(config, assignments).modalities["images"].encoder
    assert (encoder.limit, encoder.sizes) == (99, (200,))


def test_the_last_of_several_values_counts(config):
    assignments = ["images.encoder.num_layers=3", "images.encoder.num_layers=4"]
    assert with_fields(config, assignments).modalities["images"].encoder.num_layers == 4


def test_a_part_cannot_be_set_and_its_field_too(config):
    with pytest.raises(ValueError, match="encoder holds fields"):
        with_fields(config, ["images.encoder.num_layers=3", "images.encoder=4"])
