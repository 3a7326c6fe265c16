"""How far requests, one after another, have taken a model from the first: a ledger in `unlearning.json`.

Distances are Frobenius norms of the change of all weights as the model uses them. Of a LoRA that is the
scaled product B A: its factors can change without it, and a merge leaves it as it is, so requests of different
methods add up. No model is further from the first one than the sum.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn

from llm_unlearn.approximate.session import START_NAME, Session
from llm_unlearn.approximate.tuning import ADAPTER
from llm_unlearn.errors import UserError

REPORT_NAME = "unlearning.json"
Ledger = Mapping[str, Any]  # requests, distance (of the last) and at_most (None: not known)
NOTHING: Ledger = {"requests": 0, "distance": 0.0, "at_most": 0.0}
Products = dict[str, tuple[Tensor, Tensor]]


def take_up(model: Any, path: Path) -> None:
    """Give a model that was loaded from a directory the ledger that is there.

    Raises:
        UserError: see `read_ledger`.
    """
    model.travelled = read_ledger(path)


def read_ledger(path: Path) -> Ledger:
    """That of the result in a directory; one of nothing where there is none.

    Raises:
        UserError: `unlearning.json` is no report of an earlier request.
    """
    try:
        report = json.loads((path / REPORT_NAME).read_bytes())
        # A result that kept none was a request of unknown length.
        known = report.get("travelled", {"requests": 1, "distance": None, "at_most": None})
        lengths = (known["distance"], known["at_most"])
        distance, bound = (None if one is None else float(one) for one in lengths)
        return {"requests": int(known["requests"]), "distance": distance, "at_most": bound}
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path / REPORT_NAME} is no report of an earlier request: put back what was written there, or "
            "remove it (what earlier requests did is then not counted)"
        ) from None


def ledger_of(model: Any) -> Ledger:
    """What the model that is given has behind it, as far as it is known."""
    return getattr(model, "travelled", NOTHING)


class Start:
    """The weights before a request: of a LoRA its products, of a model a file in the work directory."""

    def __init__(self, session: Session):
        self.session = session
        self._products: Products | None = None
        if session.tuned.is_adapter:
            self._products = _products(session.model)
        else:
            self._stored = session.save_trained(START_NAME)

    def add_to(self, earlier: Ledger) -> Ledger:
        """The ledger with this request; it is the model's from now on."""
        is_main = PartialState().is_main_process
        distance = broadcast_object_list([self.distance() if is_main else None])[0]
        bound = earlier["at_most"]
        ledger = {
            "requests": earlier["requests"] + 1,
            "distance": distance,
            "at_most": None if None in (bound, distance) else bound + distance,
        }
        self.session.model.travelled = ledger
        return ledger

    def distance(self) -> float | None:
        """From the start to the weights as they are; None: an adapter that is more than products."""
        if not self.session.tuned.is_adapter:
            return self._of_weights()
        now = _products(self.session.model)
        if self._products is None or now is None:
            return None
        return math.sqrt(sum(_squared(*now[name], *self._products[name]) for name in now))

    def _of_weights(self) -> float:
        weights, total = dict(self.session.model.named_parameters()), 0.0
        with safe_open(self._stored, framework="pt") as stored:
            for name in stored.keys():
                now = weights[name].detach().float()
                total += float((now - stored.get_tensor(name).to(now)).norm()) ** 2
        return math.sqrt(total)


def _products(model: Any) -> Products | None:
    """B (scaled) and A of every layer, in double precision."""
    config = model.peft_config[ADAPTER]
    if config.use_dora or config.lora_bias:
        return None
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.scaling:
            continue
        A, B = _factors(layer)
        if A.dim() != 2 or B.dim() != 2:
            return None  # convolutions
        found[name] = (layer.scaling[ADAPTER] * B.double(), A.double())
    return found


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A and B where a graphics card has no double precision to lack."""
    if ADAPTER in layer.lora_embedding_A:
        factors = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    else:
        linear: tuple[nn.Linear, nn.Linear] = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # pyright: ignore
        factors = linear[0].weight, linear[1].weight
    A, B = (factor.detach().cpu() for factor in factors)
    return A, B


def _squared(B: Tensor, A: Tensor, start_B: Tensor, start_A: Tensor) -> float:
    """|B A - start_B start_A|^2 without either product: from the Gram matrices of both factors."""
    if B.equal(start_B) and A.equal(start_A):
        return 0.0  # and not what rounding makes of it
    left, right = torch.cat([B, -start_B], dim=1), torch.cat([A, start_A])
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def describe(ledger: Ledger) -> str:
    """In words, for a line that a user reads."""
    distance, bound = ledger["distance"], ledger["at_most"]
    told = f"weights moved by {distance:.3g}" if distance is not None else "weights moved"
    if ledger["requests"] > 1:
        far = "an unknown distance" if bound is None else f"at most {bound:.3g}"
        told += f", after {ledger['requests']} requests {far} from the first model"
    return told
