"""Checkpoints: saved, checked, loaded, resharded, and consolidated into a model dir."""
