"""LegoNet's placement: each record goes to the shards whose public keys it resembles most.

Yu et al., "LegoNet: A Fast and Exact Unlearning Architecture" (arXiv 2210.16023): a frozen encoder, n adapters
with fixed keys, each record learnt by the k nearest, and each prompt answered by the mean of its k nearest.
Encoder and keys may not depend on anybody's records, or a survivor's place would tell of the
deleted: the encoder is the base model, the keys are the means of clusters of public texts, and a record is
encoded on its own, so that its neighbours cannot move it by a rounding.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.exact.config import RunConfig

Vectors = NDArray[np.float32]


def middle(hidden_states: Sequence[torch.Tensor], mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the middle layer's states, of length one: (B, H).

    Args:
        hidden_states: (B, T, H) of every layer.
    """
    states_BTH = hidden_states[len(hidden_states) // 2].float()
    weights = mask_BT[..., None].to(states_BTH)
    mean_BH = (states_BTH * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean_BH, dim=-1)


@torch.no_grad()
def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
) -> Vectors:
    """One vector for each text, each text on its own: (N, H)."""
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        ids = ids["input_ids"].to(model.device)  # pyright: ignore[reportAttributeAccessIssue]
        states: Any = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        rows.append(middle(states.hidden_states, torch.ones_like(ids))[0].cpu().numpy())
    return np.stack(rows)


def asked_by(record: Record) -> str:
    """The part of a record that a prompt for it would hold."""
    if "messages" in record.content:
        turns = record.content["messages"]
        return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
    return str(record.content.get("prompt", record.content.get("text")))


def public_keys(vectors: Vectors, count: int) -> Vectors:
    """Centres of `count` clusters of public texts (k-means++, one fixed seed), of length one.

    Raises:
        UserError: fewer different texts than keys.
    """
    from scipy.cluster.vq import kmeans2

    if len(np.unique(vectors, axis=0)) < count:
        raise UserError(
            f"{count} keys need as many different public texts, got {len(vectors)}: give more in "
            "--public_path, or fewer --num_shards"
        )
    centres, _ = kmeans2(vectors.astype(np.float64), count, minit="++", rng=0)
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    return (centres / np.maximum(lengths, 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Keys:
    """The public keys of a run: one for each shard, and how many of them a text goes to.

    Attributes:
        vectors: (n, H), each of length one.
    """

    vectors: Vectors
    copies: int

    @classmethod
    def make(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        public_texts: Sequence[str],
        config: RunConfig,
    ) -> "Keys":
        """Keys for a new run.

        Raises:
            UserError: not enough public texts.
        """
        if not public_texts:
            raise UserError(
                "--exact_method lego needs --public_path: texts that are nobody's, to make its keys of"
            )
        vectors = encode(model, tokenizer, public_texts, config.max_length)
        return cls(public_keys(vectors, config.num_shards), config.copies)

    @classmethod
    def load(cls, data: bytes) -> "Keys":
        tensors = load(data)
        return cls(tensors["keys"], int(tensors["copies"][0]))

    def to_bytes(self) -> bytes:
        return save({"keys": self.vectors, "copies": np.array([self.copies])})

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def nearest(self, vector: NDArray[Any]) -> list[int]:
        """The shards that one text goes to, nearest first; ties go to the lower number."""
        likeness = self.vectors.astype(np.float64) @ vector.astype(np.float64)
        return np.argsort(-likeness, kind="stable")[: self.copies].tolist()

    def placement(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Callable[[Record], list[int]]:
        """The shards of a record."""
        return lambda record: self.nearest(
            encode(model, tokenizer, [asked_by(record)], max_length)[0]
        )
