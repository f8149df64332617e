"""Features of every layer: computed, written and read."""
