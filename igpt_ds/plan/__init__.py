"""What a run costs, before it starts: parameters, FLOPs, bytes, seconds, days. The standard library alone."""
