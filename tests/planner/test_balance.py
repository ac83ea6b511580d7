import itertools
import random

import pytest

from examples.mimo.planner.flops import Cost, ModelCost
from examples.mimo.planner.pipeline import Split, best_split, layout_flag

NOTHING = Cost(0.0, 0.0)
LAYER = Cost(1.0, 2.0)


def test_layers_alone_are_split_evenly():
    cost = ModelCost(LAYER, first=NOTHING, last=NOTHING)
    assert best_split(cost, 8, 4, 4, 16).layers == (2, 2, 2, 2)


def test_a_heavy_encoder_takes_layers_from_the_first_stage():
    cost = ModelCost(LAYER, first=LAYER * 3, last=NOTHING)
    assert best_split(cost, 9, 4, 4, 64).layers == (0, 3, 3, 3)


def test_a_heavy_head_takes_layers_from_the_last_stage():
    cost = ModelCost(LAYER, first=NOTHING, last=LAYER * 2)
    assert best_split(cost, 6, 2, 2, 32).layers == (4, 2)
    assert layout_flag((4, 2)) == "Etttt|ttL"


@pytest.mark.parametrize("seed", range(5))
def test_no_split_is_shorter(seed):
    chance = random.Random(seed)
    first, last = (Cost(chance.uniform(0, 4), chance.uniform(0, 8)) for _ in range(2))
    cost = ModelCost(LAYER, first, last)
    best = best_split(cost, 7, 3, 3, 12).timeline.seconds
    for layers in itertools.product(range(8), repeat=3):
        if sum(layers) == 7 and layers[1]:
            assert best <= Split(cost, layers, 3, 12).timeline.seconds + 1e-9
