# Sourced by the demonstrations: `processes_have_gpus N`, before N processes train.
# Each needs a GPU of its own. Where a machine shows some, but fewer, all steps run on its CPUs.
processes_have_gpus() {
  if [ "${CUDA_VISIBLE_DEVICES-unset}" = "" ]; then return; fi
  local gpus
  gpus=$(python -c "import torch; print(torch.cuda.device_count())")
  if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$1" ]; then
    echo "Training starts $1 processes, and GPUs are visible for $gpus: this runs on CPUs."
    export CUDA_VISIBLE_DEVICES=
  fi
}
