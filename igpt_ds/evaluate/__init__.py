"""Everything that judges the weights: features, probes, results, figures."""
