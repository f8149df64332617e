"""A run seen from outside: its state, why it hangs or died, how its curves compare, and whether nodes are fit to start."""
