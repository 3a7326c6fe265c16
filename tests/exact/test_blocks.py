"""Blocks are disjoint, cover the whole adapter, and are put together and taken apart exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel

from llm_unlearn.errors import UserError
from llm_unlearn.exact.adapters import adapter_config, assemble, expected_shapes, split
from llm_unlearn.exact.blocks import describe_split, make_blocks, split_evenly
from llm_unlearn.exact.config import LoraSettings
from llm_unlearn.exact.trie import Node, ground_of, live, node_key
from tests.tiny import load_tiny, make_run, node_bytes, tiny_shape

SHAPES = [
    ("layers", 2, 4, 8),
    ("layers", 3, 4, 8),
    ("layers", 4, 4, 1),
    ("ranks", 4, 4, 8),
    ("ranks", 3, 4, 8),
]

# key of a stage that owns ranks 0 to 3 of two layers, over identity "identity" and root "root"
PINNED_KEY = "329f5e335c5d93779367fc8d91645843733eefef1266893c289f5516f2c4f9bc"


def make_nodes(kind: str, slices: int, layers: int, rank: int) -> list[Node]:
    blocks = make_blocks(kind, slices, layers, rank)  # pyright: ignore[reportArgumentType]
    return [Node(str(block.stage), 0, block, (), (), None) for block in blocks]


@pytest.mark.parametrize(("kind", "slices", "layers", "rank"), SHAPES)
def test_blocks_are_disjoint_and_make_up_the_whole(
    kind: str, slices: int, layers: int, rank: int
) -> None:
    nodes = make_nodes(kind, slices, layers, rank)
    owned = [
        (name, kind == "layers" or node.block.stage)
        for node in nodes
        for name in expected_shapes(node, tiny_shape())
    ]
    assert len(set(owned)) == len(owned)
    whole: dict[str, int] = {}
    for node in nodes:
        for name, size in expected_shapes(node, tiny_shape()).items():
            axis = 0 if "lora_A" in name else 1
            whole[name] = whole.get(name, 0) + size[axis]
    assert set(whole.values()) == {rank}
    assert len(whole) == 2 * len(tiny_shape().modules)


def test_the_first_stage_owns_the_top_layers() -> None:
    blocks = make_blocks("layers", 3, 8, 4)
    assert [block.layers for block in blocks] == [(5, 6, 7), (2, 3, 4), (0, 1)]
    assert describe_split("layers", blocks) == (
        "8 layers do not divide by 3 slices: stages own [3, 3, 2] of them, in order"
    )
    assert describe_split("layers", make_blocks("layers", 4, 8, 4)) is None
    assert [block.rank for block in make_blocks("ranks", 3, 8, 8)] == [3, 3, 2]


def test_a_whole_block_is_the_complete_adapter_and_takes_the_place_of_the_one_before() -> None:
    nodes = make_nodes("whole", 3, 4, 8)
    assert [node.block.rank for node in nodes] == [8, 8, 8]
    assert all(node.block.layers == (0, 1, 2, 3) for node in nodes)
    assert live([]) == [] and live(nodes[:1]) == nodes[:1] and live(nodes) == nodes[2:]
    assert [ground_of(node, nodes[:i]) for i, node in enumerate(nodes)] == [
        ([], None), ([], nodes[0]), ([], nodes[1]),
    ]  # fmt: skip
    assert ground_of(nodes[1], []) == ([], None)  # the slice before it is empty: it starts anew
    bands = make_nodes("ranks", 3, 4, 8)
    assert live(bands) == bands and ground_of(bands[2], bands[:2]) == (bands[:2], None)


def test_keys_tell_kinds_apart_and_never_move() -> None:
    """Old runs keep their nodes: a key that is made in another way trains everything again."""
    (ranks,) = make_blocks("ranks", 1, 2, 4)
    first, second = make_blocks("whole", 2, 2, 4)
    assert ranks.to_dict() == {"stage": 0, "layers": [0, 1], "rank": 4}
    assert node_key("identity", ranks, None, "root") == PINNED_KEY
    assert node_key("identity", first, None, "root") == PINNED_KEY  # the same computation
    beside = replace(second, continues=False)
    assert node_key("identity", second, "p", "root") != node_key("identity", beside, "p", "root")
    node = Node("key", 0, second, (0, 1), ("a", "b"), "p")
    assert Node.from_dict(node.to_dict()) == node


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (3, 3), (12, 5)])
def test_even_splits_lose_nothing(total: int, parts: int) -> None:
    sizes = split_evenly(total, parts)
    assert sum(sizes) == total and len(sizes) == parts and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("kind", "message"), [("layers", "the model has 4"), ("ranks", "--lora_r is 4")]
)
def test_more_slices_than_parts_is_refused(kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_blocks(kind, 5, 4, 4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("kind", "slices", "layers", "rank"), SHAPES)
def test_assembling_adds_the_products_and_splitting_undoes_it(
    kind: str, slices: int, layers: int, rank: int
) -> None:
    generator = np.random.default_rng(0)
    nodes = make_nodes(kind, slices, layers, rank)
    parts = [
        {
            name: generator.standard_normal(size).astype(np.float32)
            for name, size in expected_shapes(node, tiny_shape()).items()
        }
        for node in nodes
    ]
    served = assemble(parts)
    for part, back in zip(parts, split(served, nodes, tiny_shape()), strict=True):
        assert part.keys() == back.keys()
        assert all(np.array_equal(part[name], back[name]) for name in part)
    name = next(name for name in served if "lora_A" in name)
    other = name.replace("lora_A", "lora_B")
    total = sum(part[other] @ part[name] for part in parts if name in part)
    np.testing.assert_allclose(served[other] @ served[name], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_depth_is_served_with_the_scale_of_training(use_rslora: bool) -> None:
    lora = LoraSettings(rank=32, alpha=64, dropout=0.1, use_rslora=use_rslora)
    for rank in (1, 8, 11, 32):
        config = adapter_config(
            {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((rank, 4))},
            lora,
            tiny_shape(),
        )
        scale = config["lora_alpha"] / (rank**0.5 if use_rslora else rank)
        assert scale == pytest.approx(lora.scale)
        assert config["lora_dropout"] == 0.0


VARIANTS = {
    "autocast": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.0},
    "uneven": {"num_slices": 3, "lora": {"lora_r": 5}},
    "rslora": {"lora": {"use_rslora": True, "lora_target_modules": ["q_proj", "v_proj"]}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", ["layers", "ranks", "whole"])
def test_training_gives_the_same_bits_twice_under_every_setting(
    tiny_base: Path, tmp_path: Path, variant: str, blocks: str
) -> None:
    options = {"num_slices": 2, "num_sequences": 1, "blocks": blocks, **VARIANTS[variant]}
    runs = [make_run(tmp_path / name, tiny_base, **options) for name in ("one", "two")]
    assert node_bytes(runs[0]) == node_bytes(runs[1])
    assert all(check.passed for check in runs[0].verify())
    PeftModel.from_pretrained(load_tiny(tiny_base)[0], str(runs[0].directory.served / "shard-0"))
