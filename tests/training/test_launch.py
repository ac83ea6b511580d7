"""The launch scripts, with two nodes on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import ROOT, run_command, run_train

LAUNCH = ROOT / "examples/mimo/launch"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
RUN = ("--tensor-model-parallel-size", "2", "--train-iters", "3", "--global-batch-size", "4")
# What Slurm's tools print and do, as far as the script asks.
SCONTROL = "#!/bin/bash\necho localhost\necho other-node\n"
SRUN = """#!/bin/bash
shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


def losses(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    file = tmp_path_factory.mktemp("one") / "metrics"
    done = run_train(*RUN, "--metrics-file", str(file), processes=2)
    assert done.returncode == 0, done.stderr
    return losses(file)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_nodes_compute_what_one_does(one_node, tmp_path):
    file = tmp_path / "metrics"
    shared = {"NODES": "2", "HEAD": f"localhost:{free_port()}", "PROCESSES": "1"}
    nodes = [
        subprocess.Popen(
            [LAUNCH / "train.sh", *RUN, "--metrics-file", str(file)],
            env={**os.environ, **shared, "NODE_RANK": rank, "PATH": PATH},
        )
        for rank in ("0", "1")
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    assert losses(file) == one_node


def test_slurm_starts_a_node_on_each_machine(one_node, tmp_path):
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NAME": "test",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_GPUS_ON_NODE": "1",
        "PATH": f"{tmp_path}:{PATH}",
    }
    work = ("--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    file = tmp_path / "metrics"
    command = [LAUNCH / "slurm.sbatch", *RUN, *work, "--metrics-file", str(file)]
    done = subprocess.run(
        command, env={**os.environ, **slurm}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert losses(file) == one_node
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "3"


def test_the_manifests_flags_are_a_layout_of_its_machines():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    replicas = job["pytorchReplicaSpecs"]
    machines = sum(part["replicas"] for part in replicas.values())
    container = replicas["Worker"]["template"]["spec"]["containers"][0]
    per_machine = int(job["nprocPerNode"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == per_machine
    script, *flags = container["args"]
    assert (ROOT / script).is_file()
    # Folders of a cluster are not here; the plan counts mock samples.
    here = ("/data/", "--dataset-provider")
    flags = [flag for flag in flags if not any(word in flag for word in here)]
    done = run_command("train.py", "--dry-run", str(machines * per_machine), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llava_avlm: TP 8 x PP 2 + sequence parallel on 16 processes")
