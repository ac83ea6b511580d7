"""From files to samples to batches."""
