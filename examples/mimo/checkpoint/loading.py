"""A trained model from a checkpoint, at any tensor- and pipeline-parallel size, strictly."""

from __future__ import annotations

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize
from megatron.training.arguments import validate_args
from megatron.training.checkpointing import _build_sharded_state_dict_metadata
from megatron.training.global_vars import set_global_variables

from examples.mimo.checkpoint.description import Checkpoint
from examples.mimo.checkpoint.resuming import CHECKPOINT_ERRORS, reason
from examples.mimo.cli.arguments import check_layout, parse_with_preset
from examples.mimo.model.layers import device
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model
from examples.mimo.training.providers import transformer_config

# What a training checkpoint holds beside the model.
NOT_THE_MODEL = ("optimizer", "chained", "rerun_state_machine_state")
# Encoders on ranks of their own put their name in front.
RANDOM_STATE = "rng_state"


def load_model(checkpoint: Checkpoint, tp: int = 1, pp: int = 1) -> StageMimoModel:
    """This rank's part of the model in evaluation mode; fp32 on CPUs, bf16 on GPUs.

    Sets up Megatron's parallel state, once a process. ValueError when the layout does not fit
    the model or the world, or when the weights are not exactly the model's.
    """
    flags = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    if torch.cuda.is_available():
        flags.append("--bf16")
    args = parse_with_preset(checkpoint.config, flags)
    if args.world_size != tp * pp:
        raise ValueError(
            f"--tp {tp} x --pp {pp} needs {tp * pp} processes, but {args.world_size} run; start "
            f"with torchrun --nproc-per-node {tp * pp}"
        )
    check_layout(args, checkpoint.config)
    validate_args(args)
    if not parallel_state.model_parallel_is_initialized():
        set_global_variables(args, build_tokenizer=False)
        initialize.initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = build_mimo_model(
        checkpoint.config,
        transformer_config(args),
        groups,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == pp - 1,
    )
    model.to(device=device(), dtype=args.params_dtype).eval()
    _load_weights(model, checkpoint, _build_sharded_state_dict_metadata(args))
    return model


def _load_weights(model: StageMimoModel, checkpoint: Checkpoint, metadata: dict) -> None:
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    try:
        # Megatron calls missing what the checkpoint has and the model does not ask for.
        state, unasked, absent = dist_checkpointing.load(
            wanted, str(checkpoint.weights), strict="return_all"
        )
    except (*CHECKPOINT_ERRORS, RuntimeError, KeyError, OSError) as error:
        raise ValueError(
            f"--ckpt {checkpoint.folder}: the weights do not load ({reason(error)})"
        ) from None
    unknown = {
        key
        for key in unasked
        if not key.startswith(NOT_THE_MODEL) and not key.endswith(RANDOM_STATE)
    }
    for problem, keys in (("lacks", absent), ("holds, unknown to the model,", unknown)):
        if keys:
            raise ValueError(
                f"--ckpt {checkpoint.folder}: the checkpoint {problem} {len(keys)} tensors, such "
                f"as {sorted(keys)[0]}; it is not {checkpoint.config.name}'s"
            )
    model.load_state_dict(state["model"], strict=True)
