"""The backbone of O3's detector: a masked language model that learns the forget texts (arXiv 2407.10223).

A LoRA for each request is trained with L = L_MLM + L_CEL. L_MLM is masked language modelling. L_CEL,
the contrastive entropy, is low where each masked text is most like one whole text of the batch, in the
lower half of the layers. Whole texts are seen by a key model that follows the trained one slowly.

Shapes: N texts of a batch, T tokens, L layers, V vocabulary, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from llm_unlearn.approximate.batches import seeded_order
from llm_unlearn.approximate.encoder import Encoder, masked_mean, read_text_model
from llm_unlearn.approximate.losses import entropy
from llm_unlearn.approximate.tuning import Tuned, copied, tune
from llm_unlearn.errors import UserError

# Queries, keys and values as BERT and RoBERTa, DistilBERT, DeBERTa and ModernBERT call them.
ATTENTION = (
    "query", "key", "value", "q_lin", "k_lin", "v_lin", "query_proj", "key_proj", "value_proj", "Wqkv",
)  # fmt: skip


@dataclass(frozen=True)
class BackboneTraining:
    """How a backbone is trained; the defaults are the paper's.

    Attributes:
        momentum: the key model's values are this part of themselves and else the trained ones; 1: frozen.
        masked: part of the tokens that is to be guessed.
        warmup: part of the steps.
    """

    momentum: float = 0.999
    learning_rate: float = 1e-5
    epochs: int = 2
    batch_size: int = 8
    masked: float = 0.15
    warmup: float = 0.06


class TunedEncoder(Encoder):
    """A text encoder with one request's LoRA; encoders of several requests share the model."""

    def __init__(self, tuned: Tuned, tokenizer: Any, tensors: Mapping[str, Tensor]):
        super().__init__(tuned.model.get_base_model().base_model, tokenizer)
        self.tuned = tuned
        self.tensors = {name: t.to(tuned.trainable[name]) for name, t in tensors.items()}

    def _states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        with self.tuned.swapped(self.tensors):
            return super()._states(ids, mask)


def load_backbone(name: str, device: Any = "cpu", seed: int = 0) -> tuple[Tuned, Any]:
    """A masked language model with a fresh LoRA on its attention, and its tokenizer.

    Raises:
        UserError: it cannot be loaded, or was not trained to guess masked tokens.
    """
    from transformers import AutoModelForMaskedLM

    model, tokenizer, missing = read_text_model(AutoModelForMaskedLM, name)
    if missing or tokenizer.mask_token_id is None:
        raise UserError(
            f"--encoder {name} is no masked language model, so it cannot be trained as the detector's "
            "backbone: say --train_detector false"
        )
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=list(ATTENTION))
    try:
        return tune(model.to(device), lora, full=False, trainable=None, seed=seed), tokenizer
    except ValueError:  # PEFT: none of these layers
        raise UserError(
            f"--encoder {name} calls its attention's layers by other names: say --train_detector false"
        ) from None


def contrastive_entropy(queries_NLD: Tensor, keys_NLD: Tensor) -> Tensor:
    """Sum over layers of the mean over i of the entropy of softmax_j(z1_i . z2_j), scalar.

    0 for a single text or where each is surely most like one other; log N a layer where all are
    equally alike. No gradient goes to the keys. The paper's code adds 1e-5 inside the logarithm.
    """
    similar_LNN = queries_NLD.transpose(0, 1) @ keys_NLD.detach().permute(1, 2, 0)
    return entropy(similar_LNN.log_softmax(-1)).mean(-1).sum()


def masked_loss(logits_NTV: Tensor, labels_NT: Tensor) -> Tensor:
    """Mean negative log-probability of the tokens that were masked; 0 where none was."""
    total = cross_entropy(logits_NTV.transpose(1, 2).float(), labels_NT, reduction="sum")
    return total / (labels_NT >= 0).sum().clamp_min(1)


def follow(keys: Mapping[str, Tensor], trained: Mapping[str, Tensor], momentum: float) -> None:
    """keys <- momentum keys + (1 - momentum) trained."""
    with torch.no_grad():
        for name, key in keys.items():
            key.mul_(momentum).add_(trained[name], alpha=1 - momentum)


def even_batches(count: int, size: int, phrase: str) -> list[list[int]]:
    """The numbers below `count` in a seeded order, in the fewest batches of at most `size` (3 or more).

    They differ by one at most: a last batch of a single text would have no contrastive entropy.
    """
    order = torch.tensor(seeded_order(count, phrase))
    return [part.tolist() for part in order.tensor_split(-(-count // size))]


def train_backbone(
    tuned: Tuned,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    how: BackboneTraining,
    seed: int,
) -> dict[str, Tensor]:
    """Train the LoRA on texts.

    The paper also takes the layer of the embeddings, which no LoRA on attention can change.

    Args:
        layers: whose contrastive entropy is lowered, counted from 1.

    Returns:
        The LoRA's values by name. The caller's random numbers are left alone.
    """
    from transformers import DataCollatorForLanguageModeling, get_linear_schedule_with_warmup

    rows = TunedEncoder(tuned, tokenizer, {}).tokenize(texts)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=how.masked)
    parts = [even_batches(len(rows), how.batch_size, f"{seed} {e}") for e in range(how.epochs)]
    batches = [batch for epoch in parts for batch in epoch]
    keys, device = copied(tuned.trainable), tuned.model.device
    optimizer = torch.optim.AdamW(
        tuned.trainable.values(), lr=how.learning_rate, eps=1e-6, weight_decay=0.01
    )
    warmup = math.ceil(how.warmup * len(batches))
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    tuned.model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for numbers in batches:
            batch = collator([{"input_ids": rows[number]} for number in numbers])
            backbone_loss(tuned, batch.to(device), keys, layers).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            follow(keys, tuned.trainable, how.momentum)
    tuned.model.eval()
    return copied(tuned.trainable)


def backbone_loss(
    tuned: Tuned, batch: Mapping[str, Tensor], keys: Mapping[str, Tensor], layers: Sequence[int]
) -> Tensor:
    """L_MLM + L_CEL of a batch of the masked texts (`input_ids`) whose `labels` are what was masked."""
    ids_NT, mask_NT, labels_NT = (batch[n] for n in ("input_ids", "attention_mask", "labels"))
    whole_NT = labels_NT.where(labels_NT >= 0, ids_NT)
    with tuned.swapped(keys):
        keys_NLD = _means(_forward(tuned, whole_NT, mask_NT), mask_NT, layers)
    outputs = _forward(tuned, ids_NT, mask_NT)
    queries_NLD = _means(outputs, mask_NT, layers)
    return masked_loss(outputs.logits, labels_NT) + contrastive_entropy(queries_NLD, keys_NLD)


def _forward(tuned: Tuned, ids_NT: Tensor, mask_NT: Tensor) -> Any:
    return tuned.model(input_ids=ids_NT, attention_mask=mask_NT, output_hidden_states=True)


def _means(outputs: Any, mask_NT: Tensor, layers: Sequence[int]) -> Tensor:
    states = [outputs.hidden_states[layer] for layer in layers]
    return torch.stack([masked_mean(state, mask_NT) for state in states], dim=1)
