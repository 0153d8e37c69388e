"""Hydra: layout words as a config group, and what a Hydra program that trains with them needs. No torch at import."""
