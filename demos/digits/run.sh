#!/usr/bin/env bash
# `make demo`: data, two training stages over two tensor-parallel processes, score, one answer.
# Interrupted, it goes on where it was; `rm -r demo` starts over.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
demo=${DEMO_DIR:-demo}
model=tiny_avlm_speech data=$demo/data align=$demo/align checkpoint=$demo/checkpoint

source demos/gpus.sh
processes_have_gpus 2

step() { printf '\n== %s\n' "$*"; }

step "Data: handwritten digits and spoken questions"
[ -f "$data/tokenizer.model" ] ||
  python examples/mimo/prepare_data.py spoken-questions --model-provider "$model" --output "$data"

# A stage begins a metrics file of its own, and an interrupted one goes on with it.
train() {
  torchrun --standalone --nproc-per-node 2 examples/mimo/train.py --model-provider "$model" \
    --tensor-model-parallel-size 2 --dataset-provider spoken_questions --data-path "$data" \
    --augment --num-workers 2 --micro-batch-size 32 --global-batch-size 32 --pack-sequences \
    --lr 1.5e-3 --lr-warmup-iters 50 --adam-beta2 0.98 --init-method-std 0.06 \
    --save-interval 300 --log-interval 50 --tensorboard-dir "$demo/tensorboard" "$@"
}

step "Training, stage 1 of 2: name pictures, transcribe recordings"
train --train-split align --train-iters 480 --min-lr 4e-4 --metrics-file "$demo/align.jsonl" \
  --save "$align" --load "$align"

step "Training, stage 2 of 2: answer spoken questions"
train --train-split train --train-iters 1050 --pretrained-checkpoint "$align" \
  --save "$checkpoint" --load "$checkpoint" \
  --eval-iters 10 --eval-interval 600 --metrics-file "$demo/train.jsonl"

step "Score on pictures and voices it never met, and of answers aloud that it hears itself"
OMP_NUM_THREADS=2 python examples/mimo/evaluate.py --ckpt "$checkpoint" --data "$data"

step "Loss curve"
python benchmarks/loss_curve.py "$demo/align.jsonl" "$demo/train.jsonl" --output "$demo/loss.svg" \
  --title "Spoken questions about handwritten digits"
echo "$demo/loss.svg"

step "One answer, aloud"
record=$(head -n 1 "$data/heldout.jsonl")
field() { sed "s/.*\"$1\": \[*\"\([^\"]*\)\".*/\1/" <<<"$record"; }
ask=(python examples/mimo/avlm_inference.py --ckpt "$checkpoint"
  --image-path "$data/$(field images)" --audio-path "$data/$(field audios)"
  --prompt "Answer aloud." --speech-out "$demo/answer.wav")
printf '%q ' "${ask[@]}" && echo
"${ask[@]}"
echo "(right is: $(field value))"
echo "$demo/answer.wav: play it, for example with aplay (Linux) or afplay (macOS)"
