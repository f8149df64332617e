"""The transformer, its objectives, its samples and its files."""
