#!/usr/bin/env bash
# `make pretrained-demo`: real weights, real pictures and recordings; only the projectors train.
# Interrupted, it goes on where it was; `rm -r pretrained-demo` starts over. STAMPS names a folder
# of Tux Paint's stamps, or the Debian package, where it cannot be downloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
demo=${DEMO_DIR:-pretrained-demo}
data=$demo/data folders=$demo/folders start=$demo/start checkpoint=$demo/checkpoint

source demos/gpus.sh
processes_have_gpus 2

step() { printf '\n== %s\n' "$*"; }

step "Data: Tux Paint's animals"
[ -d "$data" ] ||
  python examples/mimo/prepare_data.py stamps --output "$data" ${STAMPS:+--stamps "$STAMPS"}

step "Weights: Whisper tiny.en, ViT-S/14, SmolLM2-135M-Instruct"
if [ ! -d "$start" ]; then
  rm -rf "$folders" "$start.draft"
  python examples/mimo/prepare_data.py real-weights --output "$folders"
  python examples/mimo/convert.py from-hf --model-provider smollm2_avlm \
    --images "$folders/images" --audios "$folders/audios" --language-model "$folders/language" \
    --save "$start.draft"
  mv "$start.draft" "$start"
fi

step "Training the two projectors"
torchrun --standalone --nproc-per-node 2 examples/mimo/train.py --model-provider smollm2_avlm \
  --dataset-provider conversations --data-path "$data" --augment --seq-length 512 \
  --pretrained-checkpoint "$start" --micro-batch-size 8 --global-batch-size 16 \
  --pack-sequences --lr 2e-3 --min-lr 1e-4 --lr-warmup-iters 20 --train-iters 300 \
  --log-interval 10 --save "$checkpoint" --load "$checkpoint" --save-interval 60

step "Score"
OMP_NUM_THREADS=2 python examples/mimo/evaluate.py --ckpt "$checkpoint" --data "$data" \
  --splits heldout heldout_pictures compare_seen see_seen hear_seen call_seen

step "One answer"
ask=(python examples/mimo/avlm_inference.py --ckpt "$checkpoint"
  --image-path "$data/images/penguin-0.png" --audio-path "$data/audios/owl-name.flac"
  --prompt "Do picture and name agree?")
echo "${ask[*]}"
"${ask[@]}"
