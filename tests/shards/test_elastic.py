"""Going on with other readers: the rest of an epoch is dealt out, no sample twice or never."""

import collections
import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch
import yaml

from examples.mimo.data.batch import collate, collate_packed
from examples.mimo.data.conversation import BadSampleCount, SampleEncoder
from examples.mimo.shards.write import WriteOptions, prepare_shards
from tests.helpers import broken

pytest.importorskip("megatron.energon")

from examples.mimo.shards.resume import (
    STATE_FILE,
    ShardOptions,
    from_runs,
    shard_iterators,
    to_runs,
)

READERS = list(itertools.product((1, 2, 4), (0, 2)))
SEQ_LENGTH = 256


@pytest.fixture(scope="module")
def shards(tiny, data_folder, tmp_path_factory):
    """Two folders of written questions; every eleventh of the first is too long to be read."""
    folder = tmp_path_factory.mktemp("words")
    for name, size in (("a", 150), ("b", 60)):
        with (folder / f"{name}.jsonl").open("w") as lines:
            for number in range(size):
                turns = broken.turns(f"{number} " + "what " * (number % 7), "a digit")
                lines.write(json.dumps({"key": f"{name}{number}", "conversations": turns}) + "\n")
        prepare_shards(
            WriteOptions(folder / f"{name}.jsonl", data_folder, folder / name, {"train": 1.0},
                         10**6, 40, 1),
            tiny,
        )  # fmt: skip
    parts = [{"weight": 3, "path": "a"}, {"weight": 1, "path": "b"}]
    mixture = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    mixture["splits"] = {"train": {"blend": parts}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    return folder


class Training:
    """A run's readers in this process: `read` reads a micro-batch of every rank in turn."""

    def __init__(self, folder, encoder, ranks, workers, checkpoint=None, **more):
        more = {"micro_batch_size": 1, "shuffle_buffer_size": 7, "seed": 3, **more}
        packed = functools.partial(collate_packed, multiple=SEQ_LENGTH)
        self.ranks = []
        for rank in range(ranks):
            options = ShardOptions(
                folder, "train", "val", ranks, range(rank, rank + 1), num_workers=workers,
                max_bad_samples=100, checkpoint=checkpoint, saves_state=True, **more,
            )  # fmt: skip
            how = packed if options.packing_buffer_size else collate
            batches, _ = shard_iterators(options, encoder, how, collate, BadSampleCount())
            self.ranks.append(batches)

    def read(self, count):
        return [key for _ in range(count) for rank in self.ranks for key in next(rank).keys]

    def left(self):
        """How many samples the passes still hold, when nothing has been read since the deal."""
        return sum(len(one) for folder in self.ranks[0].position.passes() for one in folder)

    def save(self, folder):
        (folder / "mp_rank_00").mkdir(parents=True)
        for number, rank in enumerate(self.ranks):
            state = {"dataloader_state_dict": rank.save_state()}
            torch.save(state, folder / "mp_rank_00" / STATE_FILE.format(number))
        self.close()
        return folder

    def close(self):
        for rank in self.ranks:
            rank.close()


@pytest.fixture
def start(tiny, tokenizer):
    encoder = SampleEncoder(tiny, tokenizer, 128)
    started = []

    def start(*arguments, **more):
        started.append(Training(arguments[0], encoder, *arguments[1:], **more))
        return started[-1]

    yield start
    for training in started:
        training.close()


def assert_each_comes_as_often(start, data, first, second, steps, work, size):
    """Two stops, each followed by other readers; a single one then reads what is left."""
    training = start(data, *first)
    read = training.read(steps[0])
    training = start(data, *second, training.save(work / "first"))
    read += training.read(steps[1])
    # Another buffer is another reader too, should `second` be one without workers.
    training = start(data, 1, 0, training.save(work / "second"), shuffle_buffer_size=5)
    # With one folder a single reader gives nothing but the passes until they end.
    read += training.read(training.left())
    counts = collections.Counter(read)
    assert len(counts) == size
    assert len(set(counts.values())) == 1
    return counts["a0"]


@pytest.mark.parametrize(
    ("first", "second"), [((1, 0), (2, 0)), ((2, 0), (1, 2)), ((2, 2), (4, 0))]
)
def test_an_epoch_has_each_sample_once(first, second, shards, start, tmp_path):
    once = assert_each_comes_as_often(start, shards / "a", first, second, (7, 5), tmp_path, 150)
    assert once == 1


@pytest.mark.slow
@pytest.mark.parametrize("first", READERS)
@pytest.mark.parametrize("second", READERS)
def test_from_any_readers_to_any(first, second, shards, start, tmp_path):
    draw = random.Random(f"{first}{second}")
    steps = draw.randrange(1, 40), draw.randrange(1, 40)
    assert_each_comes_as_often(start, shards / "a", first, second, steps, tmp_path, 150)


def test_across_the_end_of_an_epoch(shards, start, tmp_path):
    """Readers with fewer samples than others are in the next epoch already."""
    twice = assert_each_comes_as_often(start, shards / "a", (4, 0), (1, 0), (43, 3), tmp_path, 150)
    assert twice == 2


def test_a_stop_in_the_rest_of_an_epoch_goes_on_with_the_next_sample(shards, start, tmp_path):
    training = start(shards / "a", 1, 0)
    training.read(20)
    first = training.save(tmp_path / "first")
    whole = start(shards / "a", 2, 2, first)
    expected = whole.read(100)
    again = start(shards / "a", 2, 2, first)
    read = again.read(9)
    again = start(shards / "a", 2, 2, again.save(tmp_path / "second"))
    assert read + again.read(91) == expected


def test_folders_of_a_mixture_are_dealt_out_each_for_itself(shards, start, tmp_path):
    training = start(shards / "mixture.yaml", 2, 0)
    read = training.read(40)
    training = start(shards / "mixture.yaml", 1, 0, training.save(tmp_path / "first"))
    lacks = training.ranks[0].position.lacks
    assert [len(lack) for lack in lacks] == [150, 60]
    # What was read of each folder is not in the rest of its epoch.
    while not {f"a{n}" for n in range(150)} <= set(read):
        read += training.read(1)
    counts = collections.Counter(key for key in read if key.startswith("a"))
    assert set(counts.values()) == {1}


def test_packed_samples_and_bad_ones_are_counted(shards, start, tmp_path):
    packing = {"packing_buffer_size": 10, "packed_seq_length": SEQ_LENGTH}
    training = start(shards / "a", 2, 0, **packing)
    read = training.read(3)
    training = start(shards / "a", 1, 0, training.save(tmp_path / "first"), **packing)
    assert training.left() == 150 - len(read)
    assert len(set(read)) == len(read)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["reads"][0].update(size=10**15),
        lambda state: state["reads"][0].update(starts=torch.tensor([0, 10**12])),
        lambda state: state["reads"][0].update(starts=[0]),
        lambda state: state.update(lacks=[]),
        lambda state: state.update(lacks=3),
        lambda state: state["sharding"].update({"data-parallel size": "four"}),
    ],
)
def test_damaged_counts_end_in_one_line(damage, shards, start, tmp_path):
    training = start(shards / "a", 1, 0)
    training.read(2)
    saved = training.save(tmp_path / "first")
    file = saved / "mp_rank_00" / STATE_FILE.format(0)
    state = torch.load(file, weights_only=True)
    damage(state["dataloader_state_dict"])
    torch.save(state, file)
    with pytest.raises(ValueError, match=rf"{file.name}: damaged \("):
        start(shards / "a", 2, 0, saved)


def test_other_data_are_refused(shards, start, tmp_path):
    training = start(shards / "a", 1, 0)
    training.read(2)
    saved = training.save(tmp_path / "first")
    with pytest.raises(ValueError, match=r"trained with samples 150, and this run has 60"):
        start(shards / "b", 1, 0, saved)


@pytest.mark.parametrize("counts", [[], [3], [0, 0, 1, 1, 0], [5, 4, 3, 3]])
def test_runs_keep_the_counts(counts):
    counts = np.array(counts, dtype=np.int32)
    if len(counts):
        assert np.array_equal(from_runs(to_runs(counts), len(counts)), counts)
    with pytest.raises(ValueError, match="samples"):
        from_runs(to_runs(counts), len(counts) + 1)
