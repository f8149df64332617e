"""Measures trained weights: features, probes, results, figures."""
