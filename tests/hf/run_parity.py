"""Run by test_parity.py on every rank: run_parity.py WORK TP PP.

Loads the converted checkpoint of every case at a layout and saves what the model computes; at
TP 2 x PP 2 saves the checkpoints again instead.
"""

import os
import sys
from pathlib import Path

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
command.single_process_unless_launched()
compat.install()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, mpu, tensor_parallel

from examples.mimo.checkpoint.description import open_checkpoint, save_description
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.model.parts import ENCODER
from tests.hf.cases import CASES


def encode(model, part, inputs):
    name = part.split(".")[0]
    inputs = dict(inputs)
    if "input_features" in inputs:
        features = inputs["input_features"]
        inputs["num_frames"] = torch.full((len(features),), features.shape[2] // 2)
    return model.modality_submodules[name].encoders[ENCODER](**inputs)


def logits(model, ids):
    """(B, S, V) on the last stage, None before."""
    if not model.pre_process:
        hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
        dist.recv(hidden, src=mpu.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(ids if model.pre_process else None)
    if not model.post_process:
        dist.send(output.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank())
        return None
    return tensor_parallel.gather_from_tensor_model_parallel_region(output)


def main():
    work, tp, pp = Path(sys.argv[1]), *map(int, sys.argv[2:])
    compat.install_results_queue()
    for name, case in CASES.items():
        if pp > 1 and case.part != "language" and tp == 1:
            continue
        with command.stdout_to(os.devnull):
            checkpoint = open_checkpoint(work / name / "ours")
            model = load_model(checkpoint, tp, pp)
        if tp * pp == 4:
            again = work / name / "again"
            (again / "release").mkdir(parents=True, exist_ok=True)
            dist.barrier()
            dist_checkpointing.save(model.sharded_state_dict(), str(again / "release"))
            save_description(again, checkpoint.config, None, checkpoint.sources)
            (again / "latest_checkpointed_iteration.txt").write_text("release")
            continue
        with torch.no_grad():
            if case.part == "language":
                result = logits(model, case.inputs["input_ids"])
            else:
                result = encode(model, case.part, case.inputs)
        if result is not None and mpu.get_tensor_model_parallel_rank() == 0:
            torch.save(result, work / name / f"output_{tp}_{pp}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
    command.leave_process_group()
