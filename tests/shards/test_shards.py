"""Reading shards: who gets which sample, packing, bad samples, going on after a stop."""

import collections
import functools
import io
import json
import re

import pytest
import torch
import yaml

from examples.mimo.data.batch import collate, collate_packed
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.shards.manifest import read_mixture
from examples.mimo.shards.write import WriteOptions, index_shards, prepare_shards
from tests.helpers import broken

pytest.importorskip("megatron.energon")

from examples.mimo.shards.read import (
    ConversationEncoder,
    Packing,
    ShardBatches,
    training_loader,
    worker_config,
)
from examples.mimo.shards.resume import from_plain, to_plain, validation_loader

SEQ_LENGTH = 256


@pytest.fixture(scope="module")
def shards(tiny, data_folder, tmp_path_factory):
    """Questions of many lengths without media, quick to read."""
    folder = tmp_path_factory.mktemp("words")
    with (folder / "m.jsonl").open("w") as lines:
        for number in range(220):
            question = f"{number}. " + "what is this? " * (number % 7)
            turns = broken.turns(question, "it is a digit") * (1 + number % 2)
            lines.write(json.dumps({"key": f"k{number}", "conversations": turns}) + "\n")
    prepare_shards(options(folder / "m.jsonl", folder / "out", folder), tiny)
    return folder / "out"


@pytest.fixture(scope="module")
def spoken(tiny, data_folder, tmp_path_factory):
    """Pictures and recordings."""
    output = tmp_path_factory.mktemp("spoken") / "out"
    prepare_shards(options(data_folder / "train.jsonl", output, data_folder), tiny)
    return output


def options(manifest, output, media):
    return WriteOptions(manifest, media, output, {"train": 0.9, "val": 0.1}, 10**6, 60, 2)


@pytest.fixture(scope="module")
def count(shards):
    return json.loads((shards / "about.json").read_text())["samples"]["train"]


@pytest.fixture
def read(tiny, tokenizer, shards):
    """Batches of one data-parallel rank."""
    reader = SampleEncoder(tiny, tokenizer, 128)
    started = []

    def start(rank=0, ranks=1, workers=0, path=shards, packing=None, max_bad=100, seed=1, size=4):
        packed = functools.partial(collate_packed, multiple=SEQ_LENGTH)
        encoder = ConversationEncoder(reader, packed if packing else collate, max_bad, packing)
        workers_config = worker_config(rank, ranks, workers, seed)
        loader = training_loader(path, "train", encoder, workers_config, size, 20)
        started.append(ShardBatches([loader]))
        return started[-1]

    yield start
    for batches in started:
        batches.close()


def keys(batches, number):
    return [next(batches).keys for _ in range(number)]


def flat(lists):
    return [key for result in lists for key in result]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_see_disjoint_samples_and_an_epoch_all_of_them(read, count, workers):
    epoch = count // 2 // max(1, workers) * max(1, workers)
    result = [flat(keys(read(rank, 2, workers, size=1), epoch)) for rank in range(2)]
    assert not set(result[0]) & set(result[1])
    for mine in result:
        assert len(set(mine)) == epoch
    assert count - len(set(flat(result))) <= 2 * max(1, workers)


def test_another_epoch_comes_in_another_order(read, count):
    result = flat(keys(read(size=1), 2 * count))
    assert sorted(result[:count]) == sorted(result[count:])
    assert result[:count] != result[count:]


def test_peers_see_the_same_and_another_seed_another_order(read):
    first, peer, other = (keys(read(0, 2, seed=seed), 10) for seed in (1, 1, 2))
    assert first == peer
    assert first != other


def next_after_a_stop(start, stop):
    batches = start()
    keys(batches, stop)
    file = io.BytesIO()
    torch.save(to_plain(batches.save_state()), file)
    expected = [next(batches) for _ in range(6)]
    file.seek(0)
    again = start()
    again.restore_state(from_plain(torch.load(file, weights_only=True)))
    return expected, [next(again) for _ in range(6)]


@pytest.mark.parametrize("packing", [None, Packing(30, SEQ_LENGTH)])
@pytest.mark.parametrize("stop", [1, 7, 45, 47, 49, 51])
def test_the_next_batch_after_a_stop_is_the_one_that_would_have_come(read, packing, stop):
    """Inside an epoch, at its end, where the shuffle buffer empties, and in the next one."""
    expected, resumed = next_after_a_stop(lambda: read(packing=packing), stop)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_media_after_a_stop_are_the_same(read, spoken, workers):
    expected, resumed = next_after_a_stop(lambda: read(path=spoken, workers=workers), 5)
    for mine, batch in zip(resumed, expected, strict=True):
        assert mine.keys == batch.keys
        assert torch.equal(mine.input_ids, batch.input_ids)
        for name, inputs in batch.modality_inputs.items():
            for key, tensor in inputs.items():
                assert torch.equal(mine.modality_inputs[name][key], tensor)


def test_packed_sequences_are_full_and_samples_whole(read, tiny, tokenizer, count):
    packed = read(packing=Packing(90, SEQ_LENGTH))
    batches = []
    while sum(len(batch.keys) for batch in batches) < 3 * count:
        batches.append(next(packed))
    assert {batch.seq_length for batch in batches} == {SEQ_LENGTH}
    assert sum(batch.num_tokens for batch in batches) / (SEQ_LENGTH * len(batches)) > 0.95
    # At an epoch's end a buffer holds some of the next.
    times = collections.Counter(flat(batch.keys for batch in batches))
    assert len(times) == count
    assert set(times.values()) <= {2, 3, 4}
    for batch in batches[:5]:
        assert len(batch.cu_seqlens) == len(batch.keys) + 1
        starts = batch.input_ids[0, torch.tensor(batch.cu_seqlens[:-1])]
        assert set(starts.tolist()) == {tokenizer.bos_id}


def test_a_validation_pass_is_always_the_same(tiny, tokenizer, shards):
    encoder = ConversationEncoder(SampleEncoder(tiny, tokenizer, 128), collate, 100, None)
    loader = validation_loader(shards, "val", encoder, worker_config(0, 1, 0, 1), 2, 3)
    passes = [[batch.keys for batch in loader] for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(passes[0]) == 3


def write_mixture(path, train):
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": train},
    }
    path.write_text(yaml.dump(content))
    return path


def test_a_mixture_draws_by_weight(read, shards, tmp_path):
    entries = [
        {"path": str(shards), "weight": 3},
        {"path": str(shards), "split_part": "val", "weight": 1},
    ]
    mixture = write_mixture(tmp_path / "mix.yaml", {"blend": entries})
    own = flat(keys(read(size=1), 400))
    drawn = collections.Counter(key in own for key in flat(keys(read(path=mixture), 100)))
    assert drawn[False] / 400 == pytest.approx(0.25, abs=0.06)
    outer = write_mixture(tmp_path / "outer.yaml", [{"path": "mix.yaml"}, {"path": str(shards)}])
    assert [part.weight for part in read_mixture(outer, "train")] == [0.375, 0.125, 0.5]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"blend": [{"path": "none"}]}, "no .nv-meta in it"),
        ({"blend": [{"path": "x", "weight": 0}]}, "must be above 0"),
        ({"blend": [{"path": "x", "aux": {}}]}, "is not an entry of a mixture"),
        ({"join": []}, "is not an entry of a mixture"),
        ({"path": "mix.yaml"}, "includes itself"),
        ([], "has no entries"),
    ],
)
def test_malformed_mixtures(tmp_path, train, message):
    path = write_mixture(tmp_path / "mix.yaml", train)
    with pytest.raises(ValueError, match=message):
        read_mixture(path, "train")


def test_a_mixture_names_no_code(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("__class__: !!python/object/apply:os.system ['touch broken']\n")
    with pytest.raises(ValueError, match="not YAML"):
        read_mixture(path, "train")
    path.write_text("__module__: os\n__class__: system\n")
    with pytest.raises(ValueError, match="must say __class__: MetadatasetV2"):
        read_mixture(path, "train")


def test_a_split_that_is_not_there(shards, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'test' in it; it has train, val"):
        read_mixture(shards, "test")
    with pytest.raises(ValueError, match=r"neither a folder of shards nor"):
        read_mixture(tmp_path / "none", "train")


@pytest.fixture(scope="module")
def broken_shards(tmp_path_factory):
    folder = broken.write_shard(tmp_path_factory.mktemp("broken"))
    index_shards(folder, ["train-0.tar"], ["train"], 1)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_skipped_and_named(read, broken_shards, workers):
    batches = read(path=broken_shards, workers=workers, size=1)
    result = [next(batches) for _ in range(60)]
    good = {f"good-{number}" for number in range(60)}
    # What comes after the last good sample is named by the next epoch's first batch.
    assert set(flat(batch.keys for batch in result)) <= good
    bad_samples = {bad.key: bad.reason for batch in result for bad in batch.bad_samples}
    cases = broken.cases()
    assert len(cases) == 60
    assert len(bad_samples) >= 50
    for key, _, _, words in cases:
        if key in bad_samples:
            assert re.search(f"{words}|not JSON|bytes", bad_samples[key]), (key, bad_samples[key])
            assert "Error: " not in bad_samples[key]


def test_nothing_but_bad_samples_ends_the_run(read, broken_shards):
    batches = read(path=broken_shards, max_bad=3, workers=0)
    with pytest.raises(ValueError, match=r"^4 samples since .* --max-bad-samples 3; the last: "):
        keys(batches, 60)
    batches = read(path=broken_shards, max_bad=3, workers=2)
    with pytest.raises(ValueError, match=r"^4 samples since .* --max-bad-samples 3; the last: "):
        keys(batches, 60)


def test_a_split_with_fewer_samples_than_readers(read, shards):
    with pytest.raises(ValueError, match=r"fewer than 2000 readers \(1000 data-parallel ranks x 2"):
        read(ranks=1000, workers=2)
