"""What may interrupt a run: signals, spikes, rollbacks, hangs."""
