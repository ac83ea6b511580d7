"""How a model is built from Megatron-Core's parallel blocks."""
