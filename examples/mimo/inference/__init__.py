"""From a prompt with pictures and recordings to an answer."""
