"""What a machine has for a training, what is wrong with it, and what to do."""
