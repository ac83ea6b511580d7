"""The worked example of a modality, at nine layouts: each computes what one process computes."""

import pytest

from tests.helpers import layouts
from tests.helpers.commands import PP2, TP2
from tests.helpers.layouts import CP2, ENCODERS_TP1, PACKED, SP, Layout

SENSORS = ("--model-provider", "sensor_lm")
NINE = {
    "TP 2": (2, TP2),
    "TP 2, sequence parallel": (2, TP2 + SP),
    "PP 2": (2, PP2),
    "DP 2": (2, ()),
    "CP 2": (2, CP2),
    "TP 2 x PP 2": (4, TP2 + PP2),
    "TP 2, encoder TP 1": (2, TP2 + ENCODERS_TP1),
    "non-colocated: encoder 1, language 1": (2, ("--encoder-ranks", "sensors=0")),
    "packed": (1, PACKED),
}
ALWAYS = {"TP 2, sequence parallel", "PP 2", "non-colocated: encoder 1, language 1"}
assert set(NINE) >= ALWAYS, "a layout that is not run"


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return layouts.References(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in NINE]
)
def test_a_layout_computes_what_one_process_computes(name, references, tmp_path):
    processes, flags = NINE[name]
    layout = Layout(name, processes, flags, model=SENSORS)
    difference = references.difference(layout, tmp_path)
    print(f"{name}: {difference}")
    assert difference.within_bounds(bf16=False), difference
    assert any("sensors" in name for name in references.run(model=SENSORS).gradients)
