#!/usr/bin/env bash
# One node's part of a run on several machines; every machine runs the same line:
#
#   NODES=2 NODE_RANK=0 HEAD=node-0:29500 PROCESSES=8 examples/mimo/launch/train.sh \
#     --model-provider llava_avlm --bf16 --tensor-model-parallel-size 8 ...
#
# HEAD is the first machine and a free port on it. NODE_RANK is fixed, not left to the
# rendezvous, so that neighbouring ranks stay on neighbouring machines in every restart.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${NODES:?how many machines}" "${NODE_RANK:?which of them is this, from 0}"
: "${HEAD:?HOST:PORT of the first machine}" "${PROCESSES:?how many GPUs this machine has}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCESSES" \
  --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" --max-restarts 0 \
  examples/mimo/train.py "$@"
