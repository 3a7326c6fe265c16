"""Loss curvature in the input: how fast the loss's gradient turns (arXiv 2410.16516).

    |grad_x loss(x + z) - grad_x loss(x)|_2,   z = h * sign(grad_x loss) / |sign(grad_x loss)|_2

with x the embeddings of a record's own tokens. Two backward passes, of first order only, so every attention
kernel will do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.encoding import Example
from llm_unlearn.memorization.orientation import Floats
from llm_unlearn.memorization.probing import TOKENS_AT_ONCE, batches, evaluating, padded

STEP = 0.01  # h of the authors' code


def curvature(
    model: Any,
    examples: Sequence[Example],
    pad_token_id: int,
    step: float = STEP,
    advance: Callable[[int], None] = lambda _: None,
) -> Floats:
    """Curvature of each record's mean loss a token, in the order of the records; not yet oriented."""
    import numpy as np

    found = np.full(len(examples), np.nan)
    with evaluating(model):
        for numbers in batches(examples, TOKENS_AT_ONCE // 2):
            batch = padded([examples[n] for n in numbers], pad_token_id, model.device)
            found[numbers] = _curvature(model, batch, step).cpu().numpy()
            advance(len(numbers))
    return found


def _curvature(model: Any, batch: dict[str, Tensor], step: float) -> Tensor:
    embeddings_BTD = model.get_input_embeddings()(batch["input_ids"]).detach()
    present_BT1 = batch["attention_mask"][..., None].to(embeddings_BTD.dtype)
    first_BTD = _gradient(model, batch, embeddings_BTD) * present_BT1
    sign_BTD = first_BTD.sign()
    length_B = sign_BTD.flatten(1).norm(dim=1).clamp_min(1.0)
    moved_BTD = embeddings_BTD + step * sign_BTD / length_B[:, None, None]
    second_BTD = _gradient(model, batch, moved_BTD) * present_BT1
    return (second_BTD - first_BTD).flatten(1).float().norm(dim=1)


def _gradient(model: Any, batch: dict[str, Tensor], embeddings_BTD: Tensor) -> Tensor:
    """Of each row's mean loss, in the row's own embeddings: rows do not meet, so their sum will do."""
    inputs_BTD = embeddings_BTD.detach().requires_grad_()
    with torch.enable_grad():
        logits_BTV = model(
            inputs_embeds=inputs_BTD, attention_mask=batch["attention_mask"], use_cache=False
        ).logits[:, :-1]
        labels_BT = batch["labels"][:, 1:]
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=-100, reduction="none"
        )
        tokens_B = (labels_BT >= 0).sum(1).clamp_min(1)
        loss = (losses_BT.sum(1) / tokens_B).sum()
        (gradient,) = torch.autograd.grad(loss, inputs_BTD)
    return gradient
