"""How a pipeline will run and how to split it, worked out from floating-point operations."""
