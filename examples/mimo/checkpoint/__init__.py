"""What a checkpoint says of its model, and loading it strictly."""
