"""Everything that learns the weights: schedule, engine, checkpoint, loop."""
