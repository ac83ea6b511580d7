"""Flags, providers, forward step, loss and progress around `megatron.training.pretrain`."""
