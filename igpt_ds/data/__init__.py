"""Raw images to palette, tokens, shards, order and batches."""
