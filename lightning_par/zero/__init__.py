"""Who owns the optimizer's states: every replica (plain torch), or DeepSpeed, which shards them over dp."""
