"""Other projects' weights: Hugging Face's directories both ways, OpenAI's checkpoints read."""
