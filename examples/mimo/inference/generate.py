"""Greedy decoding: media encoded once, the prompt once, then one token at a time.

Works on every tensor- and pipeline-parallel layout: each stage keeps the keys and values of
its own layers, hidden states travel down the stages, and the last one tells all the token.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

from examples.mimo.data.batch import Batch
from examples.mimo.models.mimo import StageMimoModel


@torch.no_grad()
def generate(
    model: StageMimoModel,
    prompts: Batch,
    max_new_tokens: int,
    eos_id: int,
    forbidden: Collection[int] = (),
) -> list[list[int]]:
    """The new tokens of each row, without the end-of-text token.

    Rows must be equally long, without padding. `forbidden` tokens are never chosen: those
    beyond the tokenizer's vocabulary, and placeholders, which would ask for media.
    """
    ids = prompts.input_ids
    assert ids is not None
    assert prompts.num_tokens == ids.numel(), "rows must be equally long"
    context = StaticInferenceContext(len(ids), ids.shape[1] + max_new_tokens)
    refused = torch.tensor(sorted(forbidden), dtype=torch.long, device=ids.device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    columns: list[torch.Tensor] = []
    media = prompts.modality_inputs
    with InferenceMode.active():
        while len(columns) < max_new_tokens and not finished.all():
            logits = _forward(model, ids, media, context)
            tokens = _choose(logits, refused, ids)
            finished |= tokens == eos_id
            columns.append(tokens)
            context.sequence_len_offset += ids.shape[1]
            context.enable_decode_mode()
            ids, media = tokens[:, None], {}
    rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in range(len(ids))]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def _forward(
    model: StageMimoModel,
    ids: torch.Tensor,
    media: dict[str, dict[str, torch.Tensor]],
    context: StaticInferenceContext,
) -> torch.Tensor | None:
    """(B, S) ids -> (B, 1, V) logits of the last position, on the last stage only."""
    config = model.config
    if not model.pre_process:
        size = (ids.shape[1], ids.shape[0], config.hidden_size)
        hidden = torch.empty(size, dtype=config.params_dtype, device=ids.device)
        dist.recv(hidden, src=mpu.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(
        input_ids=ids if model.pre_process else None,
        modality_inputs=media,
        inference_context=context,
    )
    if model.post_process:
        return output
    dist.send(output.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank())
    return None


def _choose(logits: torch.Tensor | None, refused: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B,) most likely tokens, on every stage."""
    if logits is None:
        tokens = torch.empty(len(ids), dtype=torch.long, device=ids.device)
    else:
        scores = logits[:, -1].float().index_fill(1, refused, float("-inf"))
        tokens = scores.argmax(dim=-1)
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tokens, group_src=group.size() - 1, group=group)
    return tokens
