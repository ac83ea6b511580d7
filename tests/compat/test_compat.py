import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from megatron.training import checkpointing

from examples.mimo import compat
from examples.mimo.compat.megatron import TrackerFiles
from tests.helpers import ranks
from tests.helpers.commands import ROOT


def run_code(code):
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_replacement_is_in_place_and_names_the_file_that_needs_it():
    entries = compat.install()
    assert len(entries) >= 30
    for entry in entries:
        assert getattr(entry.owner, entry.attribute) == entry.replacement, entry.name
    for entry in itertools.chain(*compat.replacements().values()):
        assert ".py" in entry.needed_by, entry.name


def test_every_replacement_is_an_object_of_its_own():
    code = (
        "import sys, torch, megatron.training.training;"
        "of_others = [value for name, module in list(sys.modules.items())"
        " if name.startswith(('torch', 'megatron')) for value in list(vars(module).values())];"
        "of_others += [*vars(torch.Tensor).values(), *vars(torch.nn.Module).values()];"
        "theirs = {id(value) for value in of_others};"
        "from examples.mimo import compat; entries = compat.install();"
        "print(len(entries), len({id(e.replacement) for e in entries}),"
        " [e.name for e in entries if id(e.replacement) in theirs])"
    )
    number, distinct, theirs = run_code(code).splitlines()[-1].split(maxsplit=2)
    assert int(distinct) == int(number) >= 30
    assert theirs == "[]"


@pytest.mark.parametrize("layout", ["one process", "non-colocated encoders"])
def test_training_sets_no_attribute_of_torch_or_megatron_but_those_of_the_table(layout, tmp_path):
    flags = ["--train-iters", "2", "--save", str(tmp_path / "checkpoint"), "--save-interval", "2"]
    processes, expected = 1, {"training.training.evaluate", "optimizer.Adam", "_results_queue"}
    if layout != "one process":
        flags += ["--encoder-ranks", "images=0", "audios=1"]
        processes, expected = 3, {*expected, "get_megatron_optimizer", "_DATA_PARALLEL_GROUP"}
    script = "tests/compat/watched_train.py"
    done = ranks.run(script, str(tmp_path / "report"), *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    for rank in range(processes):
        report = json.loads((tmp_path / f"report.{rank}").read_text())
        assert report["elsewhere"] == []
        assert report["unlisted"] == []
        for name in expected:
            assert any(set_name.endswith(name) for set_name in report["set"]), name


def test_a_tracker_that_cannot_be_written_stays_as_it_was(tmp_path):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("4")
    files = TrackerFiles(checkpointing.maybe_msc)
    interrupted = files.open(str(tracker), "w")
    interrupted.__enter__().write("8")
    assert not interrupted.__exit__(OSError, OSError("the disk is full"), None)
    assert tracker.read_text() == "4"
    with files.open(str(tracker), "w") as stream:
        stream.write("8")
        assert tracker.read_text() == "4"
    with files.open(str(tracker), "r") as stream:
        assert stream.read() == "8"
    assert files.os.path.isfile(tracker)
    assert list(tmp_path.iterdir()) == [tracker]


def run_forked(code, folder):
    """What a process prints that has imported Megatron behind `compat.install()`."""
    script = folder / "code.py"
    script.write_text(code)
    done = ranks.run(str(script), processes=0, kind="commands")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchs_compiler_can_be_imported(tmp_path):
    code = "from torch._dynamo import trace_rules; print(len(trace_rules.get_torch_obj_rule_map()))"
    assert int(run_forked(code, tmp_path).split()[-1]) > 1000


def test_the_table_is_printed_with_what_training_replaces():
    done = subprocess.run(
        [sys.executable, "-m", "examples.mimo.compat"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""
    always, training, noncolocated = re.split(r"^train.py.*$", done.stdout, flags=re.MULTILINE)
    for name in ("current_device", "compile_helpers", "empty_like"):
        assert re.search(rf"^    {name} +\S.*\.py", always, flags=re.MULTILINE)
    for name in ("train_step", "Adam", "_results_queue"):
        assert re.search(rf"^    {name} +\S.*\.py", training, flags=re.MULTILINE)
    assert "get_megatron_optimizer" in noncolocated


def test_nothing_of_torch_changes_where_cuda_is_available():
    code = (
        "import os, torch; torch.cuda.is_available = lambda: True;"
        "os.environ.pop('TORCHDYNAMO_DISABLE', None);"  # of this process, which has no GPU
        "before = {n: getattr(torch.cuda, n) for n in dir(torch.cuda)};"
        "factories = {n: getattr(torch, n) for n in ('empty', 'zeros', 'tensor')};"
        "tensor = torch.Tensor.cuda, torch.Tensor.type, torch.distributed.barrier;"
        "from examples.mimo import compat; entries = compat.install();"
        "assert all(getattr(torch.cuda, n) is v for n, v in before.items());"
        "assert all(getattr(torch, n) is v for n, v in factories.items());"
        "assert tensor == (torch.Tensor.cuda, torch.Tensor.type, torch.distributed.barrier);"
        "import megatron.training.initialize as i, megatron.training.training as t;"
        "assert t.initialize_megatron is i.initialize_megatron;"
        "assert not hasattr(i.initialize_megatron, 'func');"
        "print(sorted({s.attribute for s in entries}))"
    )
    attributes = run_code(code)
    assert "compile_helpers" in attributes
    compiles = compat.missing_for_compiling() is None
    assert ("_apply_rotary_pos_emb_bshd" in attributes) == compiles
    assert "current_device" not in attributes


def test_a_tensors_type_equals_both_names():
    name = torch.zeros(1).type()
    assert name == "torch.FloatTensor"
    assert name == "torch.cuda.FloatTensor"
    assert name != "torch.cuda.HalfTensor"


def test_factories_read_cuda_as_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert not torch.empty(2, pin_memory=True).is_pinned()


def test_a_device_context_still_holds():
    with torch.device("meta"):
        made = [torch.arange(3), torch.empty(2), torch.ones(2), torch.tensor([1.0])]
    assert all(tensor.is_meta for tensor in made)
    assert not torch.empty(2).is_meta


def test_the_cpu_host_layer_is_small():
    text = (ROOT / "examples/mimo/compat/cpu.py").read_text()
    assert len(text.splitlines()) < 250


def test_only_the_thread_that_installs_has_helpers():
    code = (
        "import os, threading, torch; torch.set_num_threads(3);"
        "from examples.mimo import compat; compat.install();"
        "threads = lambda: len(os.listdir('/proc/self/task'));"
        "work = lambda: (torch.ones(10**6).add_(1), torch.ones(500, 500).mm(torch.ones(500, 500)));"
        "before = threads(); work(); here = threads() - before; seen = [];"
        "there = lambda: (work(), seen.append((torch.get_num_threads(), threads())));"
        "other = threading.Thread(target=there); other.start(); other.join();"
        "print(torch.get_num_threads(), here, *seen[0], before)"
    )
    number, here, number_there, with_other, before = map(int, run_code(code).split()[-5:])
    assert (number, here) == (3, 2)
    # The other thread is the only one more.
    assert (number_there, with_other) == (1, before + here + 1)


FORK_AND_TRAIN = """
import os, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from examples.mimo import compat

def train():
    torch.ones(2, requires_grad=True).sum().backward()
    os._exit(len(os.listdir("/proc/self/task")))

compat.install()
with FakeTensorMode():  # from here on the first backward pass of a process starts eight threads
    torch.ones(1)
print({os.waitpid(os.fork() or train(), 0)[1] for _ in range(60)})
"""


def test_a_forked_process_can_start_many_threads_at_once():
    nine_threads = 9 << 8
    assert run_code(FORK_AND_TRAIN).strip() == f"{{{nine_threads}}}"


def test_what_a_megatron_program_asks_of_cuda_is_answered():
    """As Megatron-LM's own tests of its MIMO model do on their ranks."""
    cuda = torch.device("cuda", 0)
    module = torch.nn.Linear(2, 2).to(cuda)
    moved = [
        *(module.weight, module.to("cuda").bias, module.to(cuda, torch.bfloat16).weight),
        *(torch.ones(1).to("cuda:0"), torch.ones(1).to(device=cuda, dtype=torch.float16)),
        *(torch.ones(1).cuda(), torch.ones(1).pin_memory(), torch.randperm(3, device="cuda")),
    ]
    assert {tensor.device.type for tensor in moved} == {"cpu"}
    assert [moved[2].dtype, moved[4].dtype] == [torch.bfloat16, torch.float16]
    # Other arguments mean what they meant.
    assert torch.ones(1).to(torch.int8).dtype == torch.int8
    assert torch.ones(1).to(torch.zeros(1, dtype=torch.int16)).dtype == torch.int16
    assert torch.ones(1, device="meta").to("meta").is_meta

    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    torch.cuda.set_stream(stream)
    with torch.cuda.device(0), torch.cuda.stream(stream):
        event.record(torch.cuda.default_stream())
    torch.ones(1).record_stream(stream)
    assert event.elapsed_time(torch.cuda.Event()) >= 0
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0


def test_a_process_group_over_nccl_is_one_over_gloo(tmp_path):
    code = (
        "import torch.distributed as dist; from megatron.core.hyper_comm_grid import HyperCommGrid;"
        "dist.init_process_group('nccl', store=dist.HashStore(), rank=0, world_size=1);"
        "grid = HyperCommGrid(shape=[1, 1], dim_names=['tp', 'dp'], backend='nccl');"
        "groups = [None, grid.create_pg('dp'), dist.new_group([0], backend='cpu:gloo,cuda:nccl')];"
        "print([dist.get_backend(group) for group in groups])"
    )
    assert run_forked(code, tmp_path).splitlines()[-1] == "['gloo', 'gloo', 'gloo']"
