"""The transformer, its objective, its samples and its files."""
