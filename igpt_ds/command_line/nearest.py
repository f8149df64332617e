"""What a user may have meant: the known words nearest to an unknown one, and this project's names for flags of other programs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Flags of other training programs, each with our names for it. The first that a program has counts.
_ALIASES = {
    "batch_size": ("batch_images", "batch"),
    "train_batch_size": ("batch_images", "batch"),
    "bs": ("batch_images", "batch"),
    "per_device_train_batch_size": ("micro_batch", "batch"),
    "per_gpu_batch_size": ("micro_batch", "batch"),
    "micro_batch_size": ("micro_batch", "batch"),
    "gradient_accumulation_steps": ("micro_batch",),
    "grad_accum": ("micro_batch",),
    "learning_rate": ("lr", "rates"),
    "base_lr": ("lr", "rates"),
    "max_lr": ("lr",),
    "epochs": ("epochs", "steps"),
    "num_epochs": ("epochs", "steps"),
    "num_train_epochs": ("epochs", "steps"),
    "max_epochs": ("epochs", "steps"),
    "iterations": ("steps",),
    "iters": ("steps",),
    "num_iterations": ("steps",),
    "max_iters": ("steps",),
    "total_steps": ("steps",),
    "warmup": ("warmup_steps", "warmup_epochs"),
    "warmup_ratio": ("warmup_steps", "warmup_epochs"),
    "max_grad_norm": ("clip",),
    "wd": ("weight_decay",),
    "resid_pdrop": ("dropout",),
    "drop_rate": ("dropout",),
    "tie_word_embeddings": ("tied_embeddings",),
    "grad_clip": ("clip",),
    "gradient_clip_val": ("clip",),
    "gradient_clipping": ("clip",),
    "output": ("out", "run_dir"),
    "output_dir": ("run_dir", "out"),
    "output_path": ("out", "run_dir"),
    "o": ("out", "run_dir"),
    "outdir": ("run_dir", "out"),
    "log_dir": ("run_dir", "out"),
    "logdir": ("run_dir", "out"),
    "save_dir": ("run_dir", "out"),
    "experiment_dir": ("run_dir",),
    "train_data": ("data", "train"),
    "dataset": ("data", "features", "source"),
    "dataset_dir": ("data", "source"),
    "dataset_path": ("data", "source"),
    "data_dir": ("data", "source", "features"),
    "data_path": ("data", "source", "features"),
    "input": ("source", "data", "images", "features"),
    "image_dir": ("images", "source", "data"),
    "image_folder": ("images", "source", "data"),
    "checkpoint": ("checkpoint", "model", "resume", "run_dir"),
    "ckpt": ("model", "checkpoint", "resume", "run_dir"),
    "pretrained": ("model",),
    "model_path": ("model", "recipe"),
    "model_name_or_path": ("model", "recipe"),
    "model_size": ("recipe",),
    "arch": ("recipe",),
    "resume_from_checkpoint": ("resume",),
    "deepspeed": ("ds_config",),
    "deepspeed_config": ("ds_config",),
    "zero_stage": ("ds_config",),
    "fp16": ("precision", "ds_config"),
    "bf16": ("precision", "ds_config"),
    "dtype": ("dtype", "precision", "ds_config"),
    "mixed_precision": ("precision", "ds_config"),
    "amp": ("precision", "ds_config"),
    "gradient_checkpointing": ("activation_checkpointing", "ds_config"),
    "num_gpus": ("gpus", "ranks"),
    "ngpus": ("gpus", "ranks"),
    "nproc_per_node": ("gpus", "ranks"),
    "num_workers": ("workers",),
    "jobs": ("workers",),
    "num_layers": ("n_layer",),
    "num_hidden_layers": ("n_layer",),
    "depth": ("n_layer",),
    "num_heads": ("n_head",),
    "num_attention_heads": ("n_head",),
    "hidden_size": ("n_embd",),
    "d_model": ("n_embd",),
    "width": ("n_embd",),
    "image_size": ("n_px",),
    "img_size": ("n_px",),
    "resolution": ("n_px",),
    "vocab_size": ("n_vocab", "n_colors"),
    "mask_ratio": ("mask_prob",),
    "eval_steps": ("val_every",),
    "eval_every": ("val_every",),
    "eval_interval": ("val_every",),
    "save_steps": ("save_every",),
    "save_interval": ("save_every",),
    "checkpoint_every": ("save_every",),
    "logging_steps": ("log_every",),
    "log_interval": ("log_every",),
    "save_total_limit": ("keep_last",),
    "early_stopping_patience": ("patience",),
    "time_limit": ("max_minutes",),
    "timeout": ("timeout_s", "max_minutes"),
    "random_seed": ("seed",),
    "num_samples": ("rows", "images"),
    "n_samples": ("rows", "images"),
    "val_split": ("val_split", "eval_split", "split", "val_fraction"),
    "test_split": ("eval_split", "split"),
    "config_file": ("config",),
    "hparams": ("config",),
    "debug": ("dry_run",),
    "plan": ("dry_run",),
}


def nearest(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known words that begin as `word` does, then those of similar spelling; at most `most`."""
    names = [str(name) for name in known]
    folded = {name.lower().replace("-", "_"): name for name in names}
    plain = word.lower().replace("-", "_")
    if plain in folded:
        return [folded[plain]]
    begin = [name for low, name in folded.items() if len(plain) > 1 and low.startswith(plain)]
    close = [folded[low] for low in difflib.get_close_matches(plain, folded, most)]
    return list(dict.fromkeys([*begin, *close]))[:most]


def nearest_flags(flag: str, known: Iterable[str]) -> list[str]:
    """The flags of a program that an unknown one may stand for; empty if there is none.

    Args:
        known: the program's long flags, with their dashes.
    """
    names = [name.removeprefix("--") for name in known]
    word = flag.lstrip("-").replace("-", "_")
    if word not in names:
        for name in _ALIASES.get(word.lower(), ()):
            if name in names:
                return [f"--{name}"]
    return [f"--{name}" for name in nearest(word, names)]


def did_you_mean(words: Iterable[str]) -> str:
    """`; did you mean A or B?`, or "" without words."""
    meant = " or ".join(words)
    return f"; did you mean {meant}?" if meant else ""


def unknown_value(value: str, known: Iterable[str]) -> str:
    """`'x' is unknown; did you mean y? known: y, z`, for the name of something before it."""
    names = list(known)
    meant = did_you_mean(nearest(value, names))
    return f"{value!r} is unknown{meant}{'' if meant else ';'} known: {', '.join(names)}"
