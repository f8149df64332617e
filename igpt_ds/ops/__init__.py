"""A run seen from outside: its state, why it hangs or died, and whether nodes are fit to start."""
