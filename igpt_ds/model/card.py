"""The model card: README.md of a model dir, in the form of the Hugging Face Hub, so that the directory can be pushed as it is.

In: config.json of the model dir, and what its run and its measurements say. Out: README.md. No reader of the model needs it, and
no hash covers it. Called by `model/store.py` and `tools/model_card.py`. Strings that come from data are quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from igpt_ds.config import ModelConfig
from igpt_ds.files import atomic_file
from igpt_ds.markdown import as_table, one_line
from igpt_ds.plan.costs import parameters

CARD_FILE = "README.md"


@dataclass(frozen=True)
class CardResult:
    """One measurement. value: a percentage, or nats per token."""

    task: str  # "linear probe", "fine-tuning" or "likelihood"
    dataset: str
    split: str
    metric: str  # "accuracy" or "nats per token"
    value: float
    details: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside config.json: the training images, the last validation, and measurements.

    val_loss: in nats per token, at step val_step.
    """

    dataset: str | None = None
    n_images: int | None = None
    val_loss: float | None = None
    val_step: int | None = None
    results: Sequence[CardResult] = ()

    def with_results(self, results: Sequence[CardResult]) -> CardFacts:
        """The same with other measurements."""
        return replace(self, results=tuple(results))


def write_card(model_dir: Path, name: str, config: Mapping[str, Any], facts: CardFacts) -> None:
    """Writes README.md, atomically.

    Args:
        name: of the model, the title of the card.
        config: the fields of config.json.
    """
    with atomic_file(model_dir / CARD_FILE, "w") as file:
        file.write(card(name, config, facts))


def card(name: str, config: Mapping[str, Any], facts: CardFacts) -> str:
    """The text of README.md."""
    shape, head = ModelConfig(**config["config"]), config.get("class_head")
    size = f"{parameters(shape, config['objective']):,} parameters{', tied embeddings' if shape.tied_embeddings else ''}"
    what = "BERT" if config["objective"] == "bert" else "auto-regressive"
    lines = [
        *_front_matter(name, config, facts),
        f"# {_text(name)}",
        "",
        f"Image GPT, {what}: a transformer of {shape.n_layer} layers, {shape.n_head} heads and width {shape.n_embd}, {size}. It "
        f"reads images of {shape.n_px}x{shape.n_px} pixels as tokens of a palette of {shape.n_vocab} colours.",
        "",
        "## Training",
        "",
        as_table(["what", "value"], [(key, str(value)) for key, value in _training(config, facts).items() if value is not None]),
        "",
        "## Results",
        "",
        _results(facts.results),
        "",
        "## Use",
        "",
        "```python",
        "import igpt_ds",
        "",
        "model = igpt_ds.load(MODEL_DIR)  # the directory of this file",
        *(["model.predict(images)"] if head else ["model.sample(4)"] if config["objective"] == "ar" else []),
        'model.features(images, layer="all")  # images: PIL images, files or arrays',
        "```",
        "",
        "`config.json` has the shape and the hashes, `model.safetensors` the float32 weights, `palette.npy` the colours.",
        "",
        "## Licence",
        "",
        "Apache 2.0. The images that the model was trained on have licences of their own.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(name: str, config: Mapping[str, Any], facts: CardFacts) -> list[str]:
    """The YAML block. Texts are quoted."""
    head, datasets = config.get("class_head"), sorted({*filter(None, [facts.dataset]), *(one.dataset for one in facts.results)})
    task = "image-classification" if head else "unconditional-image-generation" if config["objective"] == "ar" else None
    lines = ["---", "license: apache-2.0", "library_name: igpt_ds", *([f"pipeline_tag: {task}"] if task else [])]
    lines += ["tags:", "- image-gpt", "- imagegpt", f"- {'bert' if config['objective'] == 'bert' else 'autoregressive'}"]
    if datasets:
        lines += ["datasets:", *(f"- {_quoted(one)}" for one in datasets)]
    if facts.results:
        lines += ["metrics:", *(f"- {metric}" for metric in sorted({one.metric.replace(" ", "_") for one in facts.results}))]
        lines += ["model-index:", f"- name: {_quoted(name)}", "  results:"]
    for one in facts.results:
        kind = "image-classification" if one.metric == "accuracy" else "unconditional-image-generation"
        lines += ["  - task:", f"      type: {kind}", f"      name: {one.task}"]
        lines += [
            "    dataset:",
            *(f"      {key}: {_quoted(one.dataset)}" for key in ("name", "type")),
            f"      split: {_quoted(one.split)}",
        ]
        lines += ["    metrics:", f"    - type: {one.metric.replace(' ', '_')}", f"      value: {one.value:.4f}"]
        lines += [f"      name: {_quoted(one.details)}"]
    return [*lines, "---", ""]


def _training(config: Mapping[str, Any], facts: CardFacts) -> dict[str, object]:
    """What is known of the training, by its name."""
    head = config.get("class_head") or {}
    images = facts.dataset and f"{facts.dataset}{f', {facts.n_images:,} images' if facts.n_images else ''}"
    loss = facts.val_loss is not None and f"{facts.val_loss:.4f} nats per token at step {facts.val_step}"
    source = config.get("source")
    return {
        "images": images or head.get("dataset"),
        "recipe": config.get("recipe"),
        "objective": config["objective"],
        **{name: config.get(name) or None for name in ("dropout", "weight_decay")},
        "steps": config["step"] or None,
        "images seen": f"{config['images_seen']:,}" if config["images_seen"] else None,
        "validation loss": loss or None,
        "fine-tuned to": f"{len(head['classes'])} classes, loss {head.get('loss')}" if head else None,
        "imported from": ", ".join(source) if source else None,
        "model_hash": config["model_hash"],
        "palette_hash": config["palette_hash"],
    }


def _results(results: Sequence[CardResult]) -> str:
    if not results:
        return "None are recorded here. `tools/model_card.py` adds the rows of result files."
    rows = [
        (
            one.task,
            one.dataset,
            one.split,
            one.details,
            f"{one.value:.1f} %" if one.metric == "accuracy" else f"{one.value:.4f} nats",
        )
        for one in results
    ]
    return as_table(["measured", "images", "split", "how", "value"], rows)


def _quoted(text: str) -> str:
    """A string of YAML in double quotes. Bytes of file names that are no UTF-8 are shown as escapes.

    JSON writes a character beyond U+FFFF as two, which YAML does not join.
    """
    quoted = json.dumps(text.encode("utf-8", "backslashreplace").decode(), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in quoted)


def _text(text: str) -> str:
    """Text in Markdown, in one line and without meaning."""
    return "".join(f"\\{c}" if c in "\\`*[]<>#|" else c for c in one_line(text))
