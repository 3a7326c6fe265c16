"""Who's Harry Potter: what the reinforced model would rather say is taken off while answering."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import Card, flag
from llm_unlearn.approximate.methods.task_vector import Reinforced, start_values
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session

FORMS = ("logits", "probabilities")
REINFORCED = "reinforced.safetensors"


@dataclass
class WhosHarryPotter(Reinforced):
    """v = v_before - alpha ReLU(v_reinforced - v_before), of logits, at every position."""

    alpha: float = flag(5.0, "weight of the difference (MUSE: 4 on News, 256 on Books)")
    form: str = flag(
        "logits", "logits, or probabilities: p - alpha (p_reinforced - p), as MUSE says"
    )

    card = Card(
        title="Who's Harry Potter",
        source="Eldan and Russinovich, arXiv 2310.02238, eq. 1; as MUSE (arXiv 2407.06460) uses it",
        idea="Fine-tunes a copy on the forget set; what that copy finds more likely than the model "
        "before gets less likely in every answer.",
        use_when="Answers may go through a wrapper, and a change that can be taken back is wanted.",
        fails_when="Nothing is removed: both models are stored, and whoever has the files has the forget "
        "set. It costs two forward passes a token, and common words that the copy likes suffer.",
        differs="The paper fine-tunes once more on the wrapped model's labels, with names replaced by "
        "generic ones; like MUSE this is the wrapped model itself. MUSE's probabilities can be "
        "negative: ours are cut at 1e-10 and normalised.",
    )
    is_suppression = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"--form is logits or probabilities, got {self.form!r}")

    def finish(self, session: Session) -> None:
        """The weights that are written are those before; the reinforced ones go beside them."""
        import torch

        session.extra_files[REINFORCED] = session.save_trained(REINFORCED)
        with torch.no_grad():
            for parameter, start in start_values(session):
                parameter.copy_(start)
        settings = {"method": "whp", "alpha": self.alpha, "form": self.form}
        session.extra_files["wrapper.json"] = json.dumps(settings).encode()

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, directory: Path, settings: Mapping[str, Any]) -> Any:
        from safetensors.torch import load_file

        from llm_unlearn.approximate.difference_model import DifferenceModel

        path = directory / REINFORCED
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the whole directory that was written")
        reinforced = load_file(path, device=str(model.device))
        return DifferenceModel(model, reinforced, settings["alpha"], settings["form"]).eval()
