"""The shard format: written, read, mapped into memory and verified here alone."""
