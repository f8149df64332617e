"""Checks of every node and rank before a run starts."""
