"""What a user brings: a model, its training step, data and a callback, written for one device with torch and Lightning only."""
