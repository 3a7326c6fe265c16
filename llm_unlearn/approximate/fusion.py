"""Several unlearning adapters as one, in closed form (EUL, arXiv 2310.20150, section 3.3).

Each request i has an adapter with the change dW_i of every adapted layer, and the Gram matrix
G_i = X_i^T X_i of that layer's inputs on its forget set. Fused is what answers all forget sets as
their own adapters do, in least squares:

    dW = (sum_i dW_i G_i) (sum_i G_i)^-1          [R outputs, D inputs; x is a row, y = x dW^T]

Before that, a ridge is added to each G_i. Where no forget set has inputs the result is then the mean
of the changes, and one adapter alone stays as it is.

dW is a sum of products of low rank: as many ranks as the adapters have together hold it exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from llm_unlearn import files
from llm_unlearn.approximate.grams import input_grams
from llm_unlearn.approximate.model_card import NO_GUARANTEE
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session

GRAM_NAME = "gram.safetensors"
WEIGHTS_NAME = "adapter_model.safetensors"
RIDGE = 1e-6


class Factors(NamedTuple):
    """A change of a layer, as the product B A (scale included)."""

    b_RK: Tensor
    a_KD: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter from disk: factors and Gram matrices by layer, in double precision."""

    config: LoraConfig
    factors: Mapping[str, Factors]
    grams: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did.

    Attributes:
        rank: of the fused adapter.
        error: the largest part of a layer's change (Frobenius) that the rank leaves out.
    """

    output: str
    adapters: int
    layers: int
    rank: int
    error: float


def gram_file(session: "Session") -> bytes:
    """Gram matrices of the adapted layers' inputs on the forget set, by the adapter's own names."""
    suffix = ".lora_A."
    layers = {
        name.rpartition(".")[0]: name.split(suffix)[0]
        for name, _ in session.model.named_parameters()
        if suffix in name
    }
    found = input_grams(session.model, set(layers), session.sides["forget"], session.pad_token_id)
    return save({layers[name]: gram.float().contiguous() for name, gram in found.items()})


def fused_change(
    changes: Sequence[Factors], grams: Sequence[Tensor], ridge: float = RIDGE
) -> Factors:
    """The least-squares change of a layer, exact, with the ranks of all together.

    Args:
        ridge: times the mean of the diagonals, added to each diagonal.
    """
    size = grams[0].shape[0]
    mean = sum(float(gram.trace()) for gram in grams) / (size * len(grams))
    eye = torch.eye(size, dtype=grams[0].dtype) * (ridge * mean)
    full = [gram + eye for gram in grams]
    # A_i G_i S^-1, with S = sum G_i symmetric: the transpose of S^-1 (G_i A_i^T).
    right = torch.cat([(one.a_KD @ gram).T for one, gram in zip(changes, full, strict=True)], dim=1)
    solved = torch.linalg.solve(torch.stack(full).sum(0), right)
    return Factors(torch.cat([one.b_RK for one in changes], dim=1), solved.T)


def refactored(change: Factors, rank: int) -> tuple[Factors, float]:
    """The best factors of that rank, filled up with zeros, and the part of the change that is lost."""
    q_left, r_left = torch.linalg.qr(change.b_RK)
    q_right, r_right = torch.linalg.qr(change.a_KD.T)
    left, values, right = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    b_RK, a_KD = q_left @ left[:, :kept] * root, root[:, None] * right[:kept] @ q_right.T
    missing = rank - kept
    b_RK = torch.nn.functional.pad(b_RK, (0, missing))
    a_KD = torch.nn.functional.pad(a_KD, (0, 0, 0, missing))
    whole = float(values.norm())
    return Factors(b_RK, a_KD), float(values[kept:].norm()) / whole if whole else 0.0


def read_adapter(directory: Path) -> Adapter:
    """An adapter that EUL wrote.

    Raises:
        UserError: files are missing, or it is no plain LoRA.
    """
    for name in ("adapter_config.json", WEIGHTS_NAME, GRAM_NAME):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}: fuse adapters that --method eul wrote")
    config = LoraConfig.from_pretrained(str(directory))
    weights, grams = load_file(directory / WEIGHTS_NAME), load_file(directory / GRAM_NAME)
    layers = {name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name}
    expected = {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    if not isinstance(config, LoraConfig) or _is_uneven(config) or expected != set(weights):
        raise UserError(f"{directory} is more than a plain LoRA with one rank: it cannot be fused")
    if layers != set(grams):
        raise UserError(f"{directory}/{GRAM_NAME} is not of the adapter's layers")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    factors = {
        layer: Factors(
            weights[f"{layer}.lora_B.weight"].double() * scale,
            weights[f"{layer}.lora_A.weight"].double(),
        )
        for layer in layers
    }
    return Adapter(config, factors, {layer: grams[layer].double() for layer in layers})


def _is_uneven(config: LoraConfig) -> bool:
    """Whether layers differ in rank or scale, or a norm is trained beside the factors."""
    return bool(config.use_dora or config.rank_pattern or config.alpha_pattern)


def fuse(
    directories: Sequence[Path], output: Path, ridge: float = RIDGE, rank: int | None = None
) -> Fusion:
    """Write one ordinary LoRA for several requests' adapters on the same model.

    The sum of the Gram matrices is written with it, so that it can be fused with later requests: that
    answers the forget sets as fusing all at once does.

    Args:
        rank: of the fused adapter; by default that of all adapters together, which loses nothing.

    Raises:
        UserError: the adapters do not belong together.
    """
    adapters = [read_adapter(directory) for directory in directories]
    if not adapters or ridge <= 0 or (rank is not None and rank < 1):
        raise UserError("fuse needs adapters, a ridge above 0 and a rank of at least 1")
    first = adapters[0]
    for directory, one in zip(directories, adapters, strict=True):
        if one.config.base_model_name_or_path != first.config.base_model_name_or_path:
            raise UserError(f"{directory} belongs to another base model than {directories[0]}")
        if one.factors.keys() != first.factors.keys():
            raise UserError(f"{directory} adapts other layers than {directories[0]}")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: choose another --output")
    rank = rank or sum(one.config.r for one in adapters)
    weights, grams, worst = {}, {}, 0.0
    for layer in sorted(first.factors):
        known = [one.grams[layer] for one in adapters]
        change = fused_change([one.factors[layer] for one in adapters], known, ridge)
        best, error = refactored(change, rank)
        worst = max(worst, error)
        weights[f"{layer}.lora_B.weight"] = best.b_RK.float().contiguous()
        weights[f"{layer}.lora_A.weight"] = best.a_KD.float().contiguous()
        grams[layer] = torch.stack(known).sum(0).float().contiguous()
    done = Fusion(str(output), len(adapters), len(grams), rank, worst)
    _write(first.config, weights, grams, done)
    return done


def _write(
    config: LoraConfig, weights: dict[str, Tensor], grams: dict[str, Tensor], done: Fusion
) -> None:
    output = Path(done.output)
    output.mkdir(parents=True, exist_ok=True)
    config.r = config.lora_alpha = done.rank  # the scale is in the factors
    config.use_rslora = False
    save_file(weights, output / WEIGHTS_NAME, metadata={"format": "pt"})
    save_file(grams, output / GRAM_NAME)
    config.save_pretrained(str(output))
    base = (
        f"base_model: {config.base_model_name_or_path}\n" if config.base_model_name_or_path else ""
    )
    card = (
        f"---\n{base}library_name: peft\ntags:\n- unlearning\n- approximate-unlearning\n---\n\n"
        f"# {done.adapters} unlearning adapters, fused\n\n{NO_GUARANTEE}\n\n"
        "Fused in closed form (EUL, arXiv 2310.20150): the least-squares answer to all forget sets. "
        f"Rank {done.rank}; the largest part of a layer's change that it leaves out is "
        f"{done.error:.2e}.\n\n`{GRAM_NAME}` was computed from the forget sets, and tells about them: "
        "delete it once nothing is to be fused any more.\n"
    )
    files.write_bytes(output / "README.md", card.encode(), mode=0o644)
