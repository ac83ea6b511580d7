import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check
from tests.helpers.commands import python_path
from tests.helpers.ranks import ROOT

SCRIPT = str(ROOT / "benchmarks/gpu_check.py")
# A child that does what its options say, in place of gpu_cases.py.
FAKE = """
import json, sys, time
options = json.loads(sys.argv[1])
for row in options["rows"]:
    print("ROW", json.dumps(row), flush=True)
if options.get("hangs"):
    print("waits", file=sys.stderr, flush=True)
    time.sleep(600)
sys.exit(options.get("error"))
"""
DEVICE = {
    "device": "NVIDIA H100 NVL",
    "memory_gib": 94.0,
    "torch": "2",
    "cuda": "13",
    "driver": "1",
}
TRAINED = {
    **{"seconds": 0.5, "tokens_per_second": 1000.0, "padding": 0.25, "data_ms": 1.0},
    **{"forward_ms": 100.0, "backward_ms": 200.0, "optimizer_ms": 50.0},
    **{"tflops_of_tokens": 417.75, "tflops_computed": 501.3, "peak_gib": 9.0, "planned_gib": None},
}


def environment(**values):
    """Without the variable by which `make test` hides devices."""
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return {**kept, "PYTHONPATH": python_path(), **values}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_says_so_and_ends_with_status_2(tmp_path):
    # As on a machine where nothing of this repository is installed, from any folder.
    command = [sys.executable, SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr == "gpu_check.py: no CUDA device here; run it on a machine with one\n"


def test_a_package_that_lacks_is_named():
    assert "soundfile cannot be imported" in gpu_check.explain(["soundfile"])


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """main() with children that do what their options say: status, what it printed, the rows."""

    def run(*cases, minutes="9"):
        page = tmp_path / "page.md"
        monkeypatch.setattr(gpu_check, "CHILD", ("-c", FAKE))
        monkeypatch.setattr(gpu_check, "CASES", cases)
        flags = ["--output", str(page), "--minutes", minutes]
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags])
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        rows = json.loads(page.with_suffix(".json").read_text())["rows"]
        return end.value.code, capsys.readouterr().out.splitlines(), rows

    return run


def fake(name, *rows, limit=60, **options):
    return gpu_check.Case(name, limit, {"rows": rows, **options})


def test_it_measures_on_when_a_case_fails_or_hangs(check, tmp_path):
    status, printed, rows = check(
        fake("device", DEVICE),
        fake("tests", {"tests": "1 failed", "passed": False}),
        fake("breaks", TRAINED, error="no memory left"),
        fake("hangs", TRAINED, limit=3, hangs=True),
        fake("last", TRAINED),
    )
    assert status == 1
    cases = ["device", "tests", "breaks", "breaks", "hangs", "hangs", "last"]
    assert [row["case"] for row in rows] == cases
    assert [line.split("s  ")[1].split(":")[0] for line in printed[:7]] == cases
    assert rows[3]["error"] == "no memory left"
    assert rows[5]["error"] == "stopped after 3 s"
    page = (tmp_path / "page.md").read_text()
    # An NVL's peak is 835.5 TFLOP/s.
    assert "| last | 500 | 1 / 100 / 200 / 50 | 1,000 | 25 % | 417.8 / 501.3 |" in page
    assert "50.0 % / 60.0 %" in page
    assert "- hangs: error: stopped after 3 s" in page


def test_all_well_is_status_0_and_no_time_left_is_said(check):
    status, _, rows = check(fake("device", DEVICE), fake("last", TRAINED), minutes="0.01")
    assert status == 0
    assert ["skipped" in row for row in rows] == [True, True]
    status, _, rows = check(fake("device", DEVICE), fake("last", TRAINED))
    assert status == 0
    assert len(rows) == 2


def test_a_run_that_is_ended_keeps_its_rows(tmp_path):
    page = tmp_path / "page.md"
    cases = f"[gpu_check.Case('device', 60, {{'rows': [{DEVICE}]}}), "
    cases += f"gpu_check.Case('hangs', 60, {{'rows': [{TRAINED}], 'hangs': 1}})]"
    program = (
        f"import sys; sys.argv = ['gpu_check.py', '--output', {str(page)!r}]\n"
        f"from benchmarks import gpu_check\ngpu_check.CHILD = ('-c', {FAKE!r})\n"
        f"gpu_check.CASES = {cases}\ngpu_check.main()"
    )
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        for line in process.stdout:
            if "hangs" in line:
                break
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["device", "hangs"]
    assert "| hangs | 500 |" in page.read_text()


@pytest.mark.parametrize(
    ("device", "tflops", "terabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 3.35),
        ("NVIDIA H100 NVL", 835.5, 3.9),
        ("NVIDIA H100 PCIe", 756.0, 2.0),
        ("NVIDIA H200", 989.5, 4.8),
        ("NVIDIA H200 NVL", 835.5, 4.8),
        ("NVIDIA GH200 480GB", 989.5, 4.0),
        ("NVIDIA B200", 2250.0, 8.0),
        ("NVIDIA GB200", 2500.0, 8.0),
        ("NVIDIA B300 SXM6 AC", 2250.0, 8.0),
        ("NVIDIA GB300", 2500.0, 8.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 2.0),
        ("NVIDIA A100-PCIE-40GB", 312.0, 1.55),
        ("NVIDIA L4", 121.0, 0.3),
        ("NVIDIA L40", 181.0, 0.86),
        ("NVIDIA L40S", 362.0, 0.86),
    ],
)
def test_peaks_of_devices(device, tflops, terabytes):
    assert gpu_check.peaks(device) == (tflops, terabytes)


def test_a_device_that_is_not_in_the_table_has_no_peak():
    assert gpu_check.peaks("NVIDIA GeForce RTX 4090") is None
    assert gpu_check.share(1.0, None) == "?"


def rehearse(tmp_path, *cases):
    """The rows of gpu_check.py on a rehearsed device."""
    page = tmp_path / "page.md"
    flags = ("--rehearse", "--output", str(page), *(["--cases", *cases] if cases else []))
    command = [sys.executable, SCRIPT, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(page.with_suffix(".json").read_text())["rows"]


def test_cases_end_well_on_a_rehearsed_device(tmp_path):
    rows = rehearse(tmp_path, "7B projectors, packed", "7B answers")
    kinds = ["device", "device", *["7B answers"] * 3, "7B projectors, packed"]
    assert [row["case"] for row in rows] == kinds
    assert [(r["batch"], r["graphs"]) for r in rows[2:5]] == [(1, True), (1, False), (64, True)]
    assert all(row["tokens_per_second"] > 0 and row["decode_tbs"] > 0 for row in rows[2:5])
    trained = rows[5]
    # Nothing is padded, and `tiny_avlm` holds more than this.
    # A packed sequence is rounded up to a multiple of 128.
    assert 0 < trained["tflops_of_tokens"] < trained["tflops_computed"]
    assert trained["planned_gib"] > 0.01


@pytest.mark.slow
def test_all_cases_end_well_on_a_rehearsed_device(tmp_path):
    rows = rehearse(tmp_path)
    assert list(dict.fromkeys(row["case"] for row in rows)) == [c.name for c in gpu_check.CASES]
    padded = next(row for row in rows if row["case"] == "1B")
    assert padded["tflops_computed"] > padded["tflops_of_tokens"] > 0


@pytest.mark.slow
def test_the_gpu_tests_run_on_a_rehearsed_device():
    """Those that start no second process; two devices are not rehearsed."""
    command = [sys.executable, "-m", "tests.helpers.rehearsal", "--run", "-m", "pytest", "-q"]
    command += ["-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
