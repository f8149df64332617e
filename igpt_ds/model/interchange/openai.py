"""Reads the checkpoints of openai/image-gpt into the form of our model; TensorFlow is not needed.

In: model.ckpt-N.index with its .data-* files; out: an `ImportedModel`. Called by tools/import_openai.py.

| ours                      | OpenAI, prefix model/                                                    |
|---------------------------|--------------------------------------------------------------------------|
| wte.weight [V, C]         | wte                                                                      |
| sos [C]                   | sos; BERT models have none                                               |
| wpe [T, C]                | wpe                                                                      |
| blocks.i.ln_1, ln_2       | h{i}/ln_1/g, ln_2/g                                                      |
| blocks.i.attn.c_attn      | h{i}/attn/q_proj, k_proj, v_proj, each [H, D, C] as [C, C], one below the other |
| blocks.i.attn.c_proj      | h{i}/attn/c_proj [H, D, C] as [C, C], transposed                         |
| blocks.i.mlp.c_fc, c_proj | h{i}/mlp/c_fc/w [C, 4 C], c_proj/w [4 C, C], transposed                  |
| ln_f.weight [C]           | ln_f/g                                                                   |
| head.weight [V, C]        | wtet                                                                     |

The optimizer's variables, global_step and the classifier are skipped.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from igpt_ds.config import ModelConfig
from igpt_ds.errors import InputError
from igpt_ds.model.interchange.hf import ImportedModel, shape_of
from igpt_ds.model.interchange.tf_bundle import Bundle

_SKIPPED = re.compile(r"(^|/)adam[^/]*(/|$)|step$|(^|/)w?clf(/|$)", re.IGNORECASE)
_BATCH = 128  # paper 3.3: images per step of S, M and L
_MASK_PROB = 0.15  # of the released BERT models (paper 2.1)


def read_openai(prefix: Path) -> ImportedModel:
    """Reads a checkpoint of openai/image-gpt; the tensors give its shape, and sos its objective.

    Args:
        prefix: model.ckpt-N beside its .index and .data-* files; the step is N. images_seen is N times the paper's batch of 128.

    Raises:
        ValueError: a file is missing or damaged, a tensor is missing, of another shape, or unknown, by name.
    """
    bundle = Bundle(prefix)
    shapes = {name.removeprefix("model/"): entry.shape for name, entry in bundle.entries.items() if name.startswith("model/")}
    for name, ndim in {"wte": 2, "wpe": 2, "h0/attn/q_proj": 3}.items():
        if len(shapes.get(name, ())) != ndim:
            found = list(shapes[name]) if name in shapes else "missing"
            raise InputError(f"{bundle.index}: 'model/{name}' is {found}; this is no checkpoint of OpenAI's image-gpt")
    (V, C), n_ctx, H = shapes["wte"], shapes["wpe"][0], shapes["h0/attn/q_proj"][0]
    n_layer = 1 + max(int(found[1]) for found in map(re.compile(r"h(\d+)/").match, shapes) if found)
    config = shape_of({"n_layer": n_layer, "n_head": H, "n_embd": C}, n_ctx, V, bundle.index)
    objective = "ar" if "sos" in shapes else "bert"
    expected = {"wte": (V, C), "wpe": (n_ctx, C), "wtet": (V, C), "ln_f/g": (C,)} | ({"sos": (C,)} if objective == "ar" else {})
    for i in range(n_layer):
        block = {"ln_1/g": (C,), "ln_2/g": (C,), "mlp/c_fc/w": (C, 4 * C), "mlp/c_proj/w": (4 * C, C)}
        block |= {f"attn/{part}_proj": (H, C // H, C) for part in "qkvc"}
        expected |= {f"h{i}/{name}": shape for name, shape in block.items()}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = list(shapes[name]) if name in shapes else "missing"
            raise InputError(f"{bundle.index}: 'model/{name}' is {found}; with the other tensors it must be {list(shape)}")
    wanted = {f"model/{name}" for name in expected}
    unknown = [name for name in bundle.entries if name not in wanted and not _SKIPPED.search(name)]
    if unknown:
        raise InputError(f"{bundle.index}: {unknown[0]!r} is a tensor that this project's model does not have")
    number = re.search(r"-(\d+)$", prefix.name)
    step = int(number[1]) if number else 0
    files = [bundle.index, *sorted({bundle.data_file(bundle.entries[name].shard) for name in wanted})]
    weights = _weights_from_openai(bundle, config, objective)
    mask_prob = _MASK_PROB if objective == "bert" else None
    return ImportedModel(config, objective, weights, None, step, step * _BATCH, files, mask_prob)


def _weights_from_openai(bundle: Bundle, config: ModelConfig, objective: str) -> dict[str, Tensor]:
    C = config.n_embd

    def take(name: str) -> Tensor:
        return torch.from_numpy(bundle.read(f"model/{name}"))

    weights = {"wte.weight": take("wte"), "wpe": take("wpe"), "ln_f.weight": take("ln_f/g"), "head.weight": take("wtet")}
    if objective == "ar":
        weights["sos"] = take("sos")
    for i in range(config.n_layer):
        block = {name: take(f"h{i}/{name}/g") for name in ("ln_1", "ln_2")}
        # q = einsum("bsf,hef->bhse"): rows (h, e) of the outputs, columns f of the inputs, as Linear has them.
        block["attn.c_attn"] = torch.cat([take(f"h{i}/attn/{part}_proj").reshape(C, C) for part in "qkv"])
        # out = einsum("bhse,hef->bsf"): here (h, e) are the inputs.
        block["attn.c_proj"] = take(f"h{i}/attn/c_proj").reshape(C, C).T.contiguous()
        block |= {f"mlp.{name}": take(f"h{i}/mlp/{name}/w").T.contiguous() for name in ("c_fc", "c_proj")}
        weights |= {f"blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    return weights
