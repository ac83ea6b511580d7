"""Every field of every config has a type and bounds, and nothing else is built."""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field

import pytest

from examples.mimo.checkpoint.description import overlay, to_dict
from examples.mimo.cli.overrides import with_fields
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from examples.mimo.configs.schema import ChatTemplate
from examples.mimo.modalities.sensor import SensorConfig
from examples.mimo.modalities.values import bounds, check, rules
from tests.helpers import outputs

CONFIGS = {name: get_model_config(name) for name in (*MODEL_PROVIDERS, outputs.SPEECH)}


def parts(config):
    """The dataclasses that a config consists of, by the path of each."""
    yield "", config
    yield "language", config.language
    yield "chat", config.chat
    for name, modality in config.modalities.items():
        yield f"modalities.{name}", modality
        for side in ("encoder", "projector", "codec"):
            if getattr(modality, side) is not None:
                yield f"modalities.{name}.{side}", getattr(modality, side)


PARTS = {f"{name}:{path}": part for name, config in CONFIGS.items() for path, part in parts(config)}


def numbers_in(kind):
    """The kinds of numbers in an annotation."""
    if kind in (int, float):
        return {kind}
    return {number for inner in typing.get_args(kind) for number in numbers_in(inner)}


@pytest.mark.parametrize("place", PARTS)
def test_every_field_has_a_type_and_every_number_bounds(place):
    part = PARTS[place]
    for name, rule in rules(type(part)).items():
        value = getattr(part, name)
        assert rule.accepts(value), name
        if rule.kind is None:  # what only a type checker can resolve is a dataclass, or absent
            assert dataclasses.is_dataclass(value) or value is None, name
        numbers = numbers_in(rule.kind)
        if not numbers or dataclasses.is_dataclass(value):
            continue
        assert -math.inf < rule.least < rule.most < 2**32, name
        scalars = [math.nan, math.inf, -math.inf, 10**30, -(10**30), True, "1", {}, [1], object()]
        scalars += [rule.least - 1, rule.most + 1] + [1.5] * (numbers == {int})
        for wrong in scalars:
            with pytest.raises(ValueError, match=rf"^{name} is .*; it must be ") as error:
                dataclasses.replace(part, **{name: wrong})
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 300
        if type(None) not in typing.get_args(rule.kind):
            with pytest.raises(ValueError, match=rf"^{name} is None; it must be "):
                dataclasses.replace(part, **{name: None})


@pytest.mark.parametrize("place", PARTS)
def test_json_lays_no_other_type_over_a_field(place):
    """Of JSON's values a field takes those that are written for it, whatever it is now."""
    part = PARTS[place]
    plain = json.loads(json.dumps(to_dict(part)))
    assert overlay(part, plain, "here") == part
    for name, value in plain.items():
        if isinstance(value, dict):
            wrongs = [None, 5, "x", [], {"a": 1}]
        else:
            allowed = rules(type(part))[name]
            wrongs = [None, True, 5, 0.5, "no choice", [], [5], ["x", None], {}, {"a": 1}, 1e400]
            if allowed.kind is None:  # a part that is absent stays so
                wrongs = wrongs[1:]
            else:
                wrongs = [wrong for wrong in wrongs if not allowed.accepts(_from_json(wrong))]
            assert wrongs, name
        for wrong in wrongs:
            with pytest.raises(ValueError, match=rf"^here.{name} ") as error:
                overlay(part, {**plain, name: wrong}, "here")
            assert "\n" not in str(error.value)


def _from_json(value):
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Radar(SensorConfig):
    """A modality of one's own, without a word about bounds but for one."""

    antennas: int = 2
    offset: int = 0
    shift: int = -3
    gain: float = 1.0
    tilt: float = field(default=0.0, metadata=bounds(-90, 90))
    name: str = "front"
    ranges: tuple[int, ...] = (1, 2)
    note: str | None = None


SENSOR = CONFIGS["sensor_lm"].modalities["sensors"].encoder
RADAR = Radar(**{f.name: getattr(SENSOR, f.name) for f in dataclasses.fields(SENSOR)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"antennas": 0}, "antennas is 0; it must be a whole number from 1 to 16,777,216"),
        ({"offset": -1}, "offset is -1; it must be a whole number from 0 to"),
        ({"shift": -4}, "shift is -4; it must be a whole number from -3 to"),
        ({"gain": -0.1}, "gain is -0.1; it must be a number from 0 to 1e+06"),
        ({"gain": math.nan}, "gain is nan; it must be a number"),
        ({"tilt": 91}, "tilt is 91; it must be a number from -90 to 90"),
        ({"name": None}, "name is None; it must be text"),
        ({"name": "x" * 70_000}, "it must be text of at most 65,536 characters"),
        ({"ranges": (1, "2")}, "ranges is (1, '2'); it must be a list of a whole number from 1"),
        ({"ranges": (1,) * 2000}, "it must be a list of a whole number from 1"),
        ({"note": 5}, "note is 5; it must be text of at most 65,536 characters or none"),
        ({"antennas": 10**5000}, "antennas is a number of more than 40 digits; it must be"),
        ({"hidden_size": 130}, "hidden_size 130 is not divisible by num_attention_heads 4"),
    ],
)
def test_a_modality_of_ones_own_is_checked_too(changes, message):
    with pytest.raises(ValueError, match=r"^\w+ ") as error:
        dataclasses.replace(RADAR, **changes)
    assert message in str(error.value)


def test_what_json_writes_becomes_what_is_declared():
    changed = dataclasses.replace(RADAR, ranges=[4, 5], gain=2)
    assert changed.ranges == (4, 5)
    assert type(changed.gain) is float


def test_a_config_that_forgets_its_own_check_is_checked_with_the_model():
    @dataclass(frozen=True)
    class Forgetful(SensorConfig):
        def __post_init__(self):
            pass

    fields = {f.name: getattr(SENSOR, f.name) for f in dataclasses.fields(SENSOR)}
    encoder = Forgetful(**{**fields, "patch_size": 0})
    with pytest.raises(ValueError, match="patch_size is 0; it must be a whole number from 1"):
        dataclasses.replace(CONFIGS["sensor_lm"].modalities["sensors"], encoder=encoder)


def test_a_language_model_has_whole_heads():
    language = CONFIGS["tiny_avlm"].language
    for changes, message in (
        ({"num_query_groups": 3}, "num_attention_heads 4 is not divisible by num_query_groups 3"),
        ({"hidden_size": 130}, "hidden_size 130 is not divisible by num_attention_heads 4"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            dataclasses.replace(language, **changes)
    assert dataclasses.replace(language, hidden_size=130, head_dim=32).query_projection_size == 128


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("images.encoder.patch_size=0", "patch_size is 0; it must be a whole number from 1 to 512"),
        ("images.encoder.std=nan,1,1", "std is (nan, 1.0, 1.0); it must be a list of 3, each"),
        ("audios.encoder.num_mel_bins=0", "num_mel_bins is 0; it must be"),
        ("audios.encoder.window_seconds=inf", "window_seconds is inf; it must be"),
        ("audios.encoder.hop_samples=-160", "hop_samples is -160; it must be"),
        ("images.projector.ffn_hidden_size=-1", "ffn_hidden_size is -1; it must be"),
        ("images.token_id=-1", "token_id is -1; it must be"),
        ("images.encoder.augment_shift=1e9", "augment_shift is 1000000000.0; it must be"),
    ],
)
def test_the_command_line_is_checked_as_well(assignment, message):
    with pytest.raises(ValueError, match=r"^--set ") as error:
        with_fields(CONFIGS["tiny_avlm"], [assignment])
    assert f"--set {assignment}: {message}" in str(error.value)


def test_a_template_is_text():
    with pytest.raises(ValueError, match=r"^start is 5; it must be text"):
        ChatTemplate(start=5)
    check(ChatTemplate())
