"""The health of a run: slow ranks and their reason, norms and scales by layer, and arithmetic that is computed twice."""
