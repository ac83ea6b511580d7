#!/usr/bin/env bash
# `make demo`: data, two training stages over two tensor-parallel processes, score, one answer.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
demo=${DEMO_DIR:-demo}
data=$demo/data align=$demo/align checkpoint=$demo/checkpoint

step() { echo; echo "== $*"; }

step "Data: handwritten digits and spoken questions"
[ -f "$data/tokenizer.model" ] ||
  python examples/mimo/prepare_data.py spoken-questions --output "$data"

train() {
  torchrun --nproc-per-node 2 examples/mimo/train.py --model-provider tiny_avlm \
    --tensor-model-parallel-size 2 --dataset-provider spoken_questions --data-path "$data" \
    --augment --micro-batch-size 64 --global-batch-size 64 --lr 1.5e-3 --lr-warmup-iters 50 \
    --log-interval 50 "$@"
}

step "Training, stage 1: name pictures, transcribe recordings"
train --train-split align --train-iters 600 --min-lr 3e-4 \
  --save "$align" --load "$align" --save-interval 300

step "Training, stage 2: answer spoken questions"
rm -rf "$checkpoint"
train --train-split train --train-iters 900 --load "$align" --finetune \
  --save "$checkpoint" --save-interval 300 --eval-iters 5 --eval-interval 300

step "Score on pictures and voices it never met"
python examples/mimo/evaluate.py --ckpt "$checkpoint" --data "$data"

step "One answer"
python examples/mimo/demo_answer.py "$checkpoint" "$data"
