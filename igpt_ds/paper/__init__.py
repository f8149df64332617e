"""The paper's published numbers, and its experiments as commands."""
