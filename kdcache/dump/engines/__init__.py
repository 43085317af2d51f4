"""Teacher engines: a batch of token sequences in, their targets out."""
