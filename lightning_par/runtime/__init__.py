"""What every technique stands on: the mesh of ranks, collectives, randomness, the record on each parameter."""
