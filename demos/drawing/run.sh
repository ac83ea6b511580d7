#!/usr/bin/env bash
# `make drawing-demo`: data, two training stages over two tensor-parallel processes, score, drawings.
# Interrupted, it goes on where it was; `rm -r drawing-demo` starts over.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
demo=${DEMO_DIR:-drawing-demo}
data=$demo/data align=$demo/align checkpoint=$demo/checkpoint

source demos/gpus.sh
processes_have_gpus 2

step() { printf '\n== %s\n' "$*"; }

step "Data: spoken numbers, handwritten digits and their patches"
[ -f "$data/tokenizer.model" ] || python -m demos.drawing.data --output "$data"

train() {
  torchrun --standalone --nproc-per-node 2 examples/mimo/train.py \
    --model-provider demos.drawing.model:drawing_lm --tensor-model-parallel-size 2 \
    --dataset-provider conversations --data-path "$data" --augment --num-workers 2 \
    --micro-batch-size 32 --global-batch-size 32 --pack-sequences \
    --lr 1.5e-3 --lr-warmup-iters 50 --adam-beta2 0.98 --init-method-std 0.06 \
    --save-interval 200 --log-interval 50 "$@"
}

step "Training, stage 1 of 2: write down what is said"
train --train-split align --train-iters 600 --min-lr 4e-4 --save "$align" --load "$align"

step "Training, stage 2 of 2: name the number and draw it"
train --train-split train --train-iters 500 --pretrained-checkpoint "$align" \
  --save "$checkpoint" --load "$checkpoint"

step "Score on voices it never heard"
OMP_NUM_THREADS=2 python -m demos.drawing.score --ckpt "$checkpoint" --data "$data" \
  --sheet "$demo/drawings.png"
echo "$demo/drawings.png"

step "One drawing"
recordings=("$data"/audios/heldout/7-*.flac)
ask=(python examples/mimo/avlm_inference.py --ckpt "$checkpoint" --audio-path "${recordings[0]}"
  --temperature 1 --drawing-out "$demo/seven.png")
echo "${ask[*]}"
"${ask[@]}"
echo "$demo/seven.png"
