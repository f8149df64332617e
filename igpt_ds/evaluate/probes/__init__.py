"""Linear probes on features: L-BFGS and SGD."""
