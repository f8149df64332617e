"""igpt_ds: Generative Pretraining from Pixels (Chen et al. 2020) under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
