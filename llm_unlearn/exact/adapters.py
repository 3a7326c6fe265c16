"""Adapters as files: nodes on disk, and the ordinary PEFT adapter assembled from a path of them.

Everything here is plain numpy, so that a deletion does not wait for torch to be imported.
LoRA factors are float32 and named as PEFT names them.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from llm_unlearn.data.records import canonical
from llm_unlearn.errors import RunError
from llm_unlearn.exact.config import LoraSettings, ModelShape
from llm_unlearn.exact.trie import Node

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
PREFIX = "base_model.model."
MERGED = "merged"
NAME = re.compile(r"(shard-\d+|core|merged)@([0-9a-f]{12,64})")
"""What an adapter is called where it is served, so that another content has another name."""
DIGITS_IN_NAME = 12

Tensors = dict[str, np.ndarray]


def to_bytes(tensors: Tensors) -> bytes:
    """The safetensors file of some tensors: equal tensors give equal bytes."""
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return save(ordered, metadata={"format": "pt"})


def load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise RunError(
            f"{path} is damaged or missing ({error}): run `llm-unlearn verify`, then `llm-unlearn rebuild` the run"
        ) from None


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def expected_shapes(node: Node, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a node owns: `lora_A` (rank, in), `lora_B` (out, rank)."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = set(node.block.layers)
    for module in shape.modules:
        if module.layer in layers:
            shapes[PREFIX + module.name + LORA_A] = (node.block.rank, module.inputs)
            shapes[PREFIX + module.name + LORA_B] = (module.outputs, node.block.rank)
    return shapes


def assemble(parts: list[Tensors]) -> Tensors:
    """One adapter of several blocks, exactly: bands of one module are put side by side.

    `lora_A` is concatenated over its rows and `lora_B` over its columns, so their product is the
    sum of the bands' products; a module owned by one block keeps its bytes.
    """
    collected: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, tensor in part.items():
            collected.setdefault(name, []).append(tensor)
    return {
        name: np.concatenate(bands, axis=0 if name.endswith(LORA_A) else 1)
        for name, bands in collected.items()
    }


def split(tensors: Tensors, nodes: list[Node], shape: ModelShape) -> list[Tensors]:
    """Inverse of `assemble`: the part of each node, in order."""
    used: dict[str, int] = {}
    parts: list[Tensors] = []
    for node in nodes:
        part: Tensors = {}
        for name in expected_shapes(node, shape):
            start = used.get(name, 0)
            band = slice(start, start + node.block.rank)
            part[name] = tensors[name][band] if name.endswith(LORA_A) else tensors[name][:, band]
            used[name] = start + node.block.rank
        parts.append(part)
    return parts


def empty_adapter(shape: ModelShape) -> Tensors:
    """A rank-1 adapter of zeros on one module: it loads like any other and changes no bit."""
    module = shape.modules[-1]
    return {
        PREFIX + module.name + LORA_A: np.zeros((1, module.inputs), np.float32),
        PREFIX + module.name + LORA_B: np.zeros((module.outputs, 1), np.float32),
    }


def adapter_config(tensors: Tensors, lora: LoraSettings, shape: ModelShape) -> dict[str, Any]:
    """The PEFT configuration of an assembled adapter, with the scale used in training.

    Modules of lower rank than the others (`layers` blocks on a core) have theirs in a pattern.
    Dropout is left out of a served adapter: it acts in training only.
    """
    ranks = {
        name.removeprefix(PREFIX).removesuffix(LORA_A): tensor.shape[0]
        for name, tensor in sorted(tensors.items())
        if name.endswith(LORA_A)
    }
    modules = [module for module in shape.modules if module.name in ranks]
    rank = max(ranks.values())
    lower = {name: held for name, held in ranks.items() if held < rank}
    patterns = {
        "rank_pattern": lower,
        "alpha_pattern": {name: lora.alpha_for(held) for name, held in lower.items()},
    }
    return {
        "base_model_name_or_path": shape.name_or_path,
        "bias": "none",
        "fan_in_fan_out": shape.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": shape.layers_pattern,
        "layers_to_transform": sorted({module.layer for module in modules}),
        "lora_alpha": lora.alpha_for(rank),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "revision": shape.revision,
        "target_modules": sorted({module.name.rsplit(".", 1)[-1] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.use_rslora,
    } | (patterns if lower else {})


def served_digest(tensors_file: bytes, config: dict[str, Any]) -> str:
    """What identifies a served adapter: its weights and the configuration that scales them."""
    return hashlib.sha256(hashlib.sha256(tensors_file).digest() + canonical(config)).hexdigest()


def adapter_name(member: str, digest: str) -> str:
    """What an adapter is called where it is served: caches are kept by name, and none outlives its content.

    Args:
        member: `shard-3`, `core` or `merged`.
        digest: what identifies it (`served_digest`).
    """
    return f"{member}@{digest[:DIGITS_IN_NAME]}"


def merged_name(adapters: Iterable[tuple[str, bool]]) -> str:
    """What the one adapter is called that several are merged into.

    Args:
        adapters: their names, and whether each is withdrawn: then it has no part in it.
    """
    parts = [f"{name.partition('@')[0]}@" if is_gone else name for name, is_gone in adapters]
    return adapter_name(MERGED, hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest())


def tensors_digest(tensors: Tensors) -> str:
    """SHA-256 of some tensors as the file that `to_bytes` makes of them, wherever they are."""
    return hashlib.sha256(to_bytes(tensors)).hexdigest()
