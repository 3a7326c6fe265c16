"""Blocks: what the stages of a sequence own of a LoRA adapter.

`layers` is the S3T paper's choice (section 3.2): stage i owns every target module in one group of
layers, the first stage the top group. `ranks` is ours: stage i owns a band of ranks in every
layer. Both are disjoint and give the complete adapter the rank `rank` and the same number of
parameters. `whole` is SISA's (arXiv 1912.03817, section 4): every stage owns the complete adapter
and continues from the one before it, whose checkpoint stays for a deletion to go back to.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llm_unlearn.errors import UserError

BlockKind = Literal["layers", "ranks", "whole"]


@dataclass(frozen=True)
class Block:
    """What one stage trains.

    Attributes:
        stage: position in the sequence, from 0.
        layers: indices of the decoder layers that the block touches, ascending.
        rank: rank of its LoRA factors in each of them.
        continues: it starts from the tensors of the block before it, if there is one, and takes
            its place; otherwise it starts anew and stands beside those before it, which are frozen.
    """

    stage: int
    layers: tuple[int, ...]
    rank: int
    continues: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What is hashed. `continues` is told only where it is true: other keys never had it."""
        told = asdict(self) | {"layers": list(self.layers)}
        return told if self.continues else {n: v for n, v in told.items() if n != "continues"}


def split_evenly(total: int, parts: int) -> list[int]:
    """Sizes of `parts` groups that differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def make_blocks(kind: BlockKind, num_slices: int, num_layers: int, rank: int) -> list[Block]:
    """One block per stage.

    The first `whole` block has nothing to continue: it is what an expert on the same records is,
    with the same key.

    Raises:
        UserError: more slices than layers (`layers`) or than ranks (`ranks`).
    """
    every_layer = tuple(range(num_layers))
    if kind == "whole":
        return [Block(stage, every_layer, rank, continues=stage > 0) for stage in range(num_slices)]
    if kind == "ranks":
        if num_slices > rank:
            raise UserError(
                f"--num_slices {num_slices} needs at least as many ranks, but --lora_r is {rank}: "
                "raise --lora_r or use fewer slices"
            )
        bands = split_evenly(rank, num_slices)
        return [Block(stage, every_layer, band) for stage, band in enumerate(bands)]
    if num_slices > num_layers:
        raise UserError(
            f"--num_slices {num_slices} needs at least as many layers, but the model has {num_layers}: "
            "use fewer slices or --blocks ranks"
        )
    blocks, top = [], num_layers
    for stage, size in enumerate(split_evenly(num_layers, num_slices)):
        blocks.append(Block(stage, tuple(range(top - size, top)), rank))
        top -= size
    return blocks


def describe_split(kind: BlockKind, blocks: list[Block]) -> str | None:
    """One line that says how an uneven split was made; None where all blocks are alike."""
    sizes = [len(block.layers) if kind == "layers" else block.rank for block in blocks]
    if len(set(sizes)) == 1:
        return None
    return f"{sum(sizes)} {kind} do not divide by {len(sizes)} slices: stages own {sizes} of them, in order"
