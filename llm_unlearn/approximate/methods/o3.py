"""O3: refuse what is to be forgotten, by an adapter that is switched on by prompts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.approximate.methods.random_label import mismatched
from llm_unlearn.approximate.refusals import refusals_flag, refused
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.detector import Calibration
    from llm_unlearn.approximate.detector_training import BackboneTraining
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record

ANSWER = "forget/answer"
EARLIER = "earlier.safetensors"


@dataclass
class O3(Method):
    """L = CE(refusal | forget prompt) + orthogonality * sum over earlier t of ||A_t A^T||_F^2."""

    orthogonality: float = flag(0.1, "weight of the overlap with the adapters of earlier requests")
    target: str = flag(
        "refusal", "what is learnt instead: refusal, or wrong (a forget record's other answer)"
    )
    refusals: str | None = refusals_flag()
    earlier: str = flag(
        "",
        "directory that the request before wrote (default: that which the model was loaded from)",
    )
    gamma: float = flag(1000.0, "of the detector: weight of the nearest text's cosine")
    held_out: float = flag(0.3, "part of the forget records that the detector is calibrated with")
    quantile: float = flag(0.05, "of the held-out scores, from which the adapter is half on")
    margin: float = flag(0.5, "standard deviations below that quantile")
    steepness: float = flag(4.0, "of the adapter's weight, by standard deviation")
    train_detector: bool = flag(
        True, "with --encoder, a masked language model: train a LoRA on it with the forget texts"
    )
    detector_momentum: float = flag(0.999, "of its key model (the paper's code: 1, frozen)")
    detector_learning_rate: float = flag(1e-5, "of that training")
    detector_epochs: int = flag(2, "of that training")

    card = Card(
        title="O3: orthogonal adapters behind a detector",
        source="Gao et al., On Large Language Model Continual Unlearning, arXiv 2407.10223",
        idea="An adapter learns to refuse; request after request it goes on being trained, away from the "
        "rows of its earlier states. A detector for each request compares a prompt with the texts "
        "to be forgotten, layer by layer, and weighs the adapter: 0 leaves the base model.",
        use_when="Requests come one after another, and there is no data to keep.",
        fails_when="It removes nothing: without the adapter all is there, and prompts that the detector does "
        "not know (another language, a paraphrase, a long context) pass it. Neighbours of the forget "
        "set are refused too, the more the fewer records there are. The detector stores statistics "
        "of the forget texts, and a trained backbone has learnt them: keep these files as you would keep "
        "the texts. Python: PEFT alone does not tell which request an adapter is from; give `earlier`, or "
        "load it with `load_model`.",
        differs="Scores have one sign (the code adds a distance where it should subtract), means leave out "
        "padding, covariances are shrunk, the weight is one-sided: sigmoid(steepness * (score - threshold)) "
        "with the threshold from held-out forget texts. Cosines are of features less their mean. Layers are "
        "averaged in units of held-out spread instead of a one-class SVM. Without --encoder the detector's "
        "backbone is the base model as it is; with one it is trained as in the paper, on the texts that the "
        "detector is fitted to and not on the held-out ones, and the key model's LoRA factors follow the "
        "trained ones (the code freezes it). Rows of a batch have their own weights.",
    )
    preset = flags(
        learning_rate=2e-5, num_train_epochs=10.0, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, weight_decay=0.1,
    )  # fmt: skip
    uses_retain = False
    is_suppression = True

    def __post_init__(self) -> None:
        if self.target not in ("refusal", "wrong"):
            raise UserError(f"--target is refusal or wrong, got {self.target!r}")
        parts = (self.held_out, self.quantile, self.detector_momentum)
        if min(parts) < 0 or max(parts) > 1 or self.held_out in (0, 1):
            raise UserError("--held_out, --quantile and --detector_momentum are between 0 and 1")
        if self.detector_epochs < 1 or self.detector_learning_rate <= 0:
            raise UserError("--detector_epochs and --detector_learning_rate are above 0")
        self._factors: dict[str, Tensor] = {}  # lora_A weights by module
        self._earlier: dict[str, Tensor] = {}  # the same by request/module

    def start_from(self, model: Any) -> Any:
        return super().start_from(getattr(model, "adapted", model))

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        forget, seed = session.forget, session.config.seed
        if self.target == "wrong":
            return {ANSWER: mismatched(forget, forget, seed)}
        return {ANSWER: refused(forget, self.refusals, seed)}

    def prepare(self, session: Session) -> None:
        from llm_unlearn.approximate.request_detectors import make_detector

        if not session.tuned.is_adapter:
            raise UserError("O3 weighs an adapter by row, and --full leaves none: take --full away")
        if len(session.forget) < 2:
            raise UserError(
                "O3's detector needs two forget records at least, one to calibrate with"
            )
        trained = session.tuned.trainable.items()
        self._factors = {name: factor for name, factor in trained if ".lora_A." in name}
        if directory := self._directory(session):
            self._read_earlier(directory, session)
        self._detector = make_detector(session, ANSWER, *self._detector_settings())

    def _directory(self, session: Session) -> Path | None:
        given = self.earlier or getattr(session.model, "written_in", "")
        return Path(given) if given else None

    def _read_earlier(self, directory: Path, session: Session) -> None:
        from safetensors.torch import load_file

        if not (directory / EARLIER).is_file():
            raise UserError(f"{directory} was not written by --method o3: it has no {EARLIER}")
        encoder = _settings(directory)["encoder"]
        if encoder != session.encoder:
            raise UserError(f"the detectors in {directory} are of --encoder {encoder}: give it")
        self._earlier = load_file(directory / EARLIER, device=str(session.model.device))
        last = _settings(directory)["requests"] - 1
        for name, factor in self._factors.items():
            known = self._earlier.get(f"{last}/{name}")
            if known is None or known.shape != factor.shape or not known.equal(factor.to(known)):
                raise UserError(
                    f"the model does not come with the adapter in {directory}: give that one"
                )

    def _detector_settings(self) -> tuple[Calibration, BackboneTraining | None]:
        from llm_unlearn.approximate.detector import Calibration
        from llm_unlearn.approximate.detector_training import BackboneTraining

        numbers = Calibration(self.gamma, self.held_out, self.quantile, self.margin, self.steepness)
        rate, epochs = self.detector_learning_rate, self.detector_epochs
        how = BackboneTraining(self.detector_momentum, rate, epochs)
        return numbers, how if self.train_detector else None

    def terms(self, step: Step) -> list[Term]:
        answer = step[ANSWER]
        terms = [answer.per_token("answer", -answer.log_probabilities_BT)]
        if self._earlier and self.orthogonality:
            overlap = overlap_with_earlier(self._factors, self._earlier)
            # The mean over the step's rows of what is the same for each: counted once.
            rows_B = overlap.expand(len(answer.index_B))
            terms.append(answer.per_row("overlap", rows_B, self.orthogonality))
        return terms

    def finish(self, session: Session) -> None:
        from safetensors.torch import save

        from llm_unlearn.approximate.request_detectors import detector_files, read_detectors
        from llm_unlearn.approximate.tuning import copied

        directory = self._directory(session)
        number = _settings(directory)["requests"] if directory else 0
        detectors = read_detectors(directory, number) if directory else []
        now = {f"{number}/{name}": factor for name, factor in self._factors.items()}
        told = {"method": "o3", "requests": number + 1, "encoder": session.encoder}
        written = detector_files([*detectors, self._detector])
        session.model.written_in = str(session.config.output_dir)  # for a next request
        session.extra_files |= {
            "wrapper.json": json.dumps(told).encode(), EARLIER: save(copied(self._earlier | now)), **written,
        }  # fmt: skip
        session.notes.append(
            f"{' and '.join(written)} tell about the forget texts of {number + 1} requests: guard them as those"
        )

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, directory: Path, settings: Mapping[str, Any]) -> Any:
        from llm_unlearn.approximate.request_detectors import read_detectors, soft_adapter

        model.written_in = str(directory)
        detectors = read_detectors(directory, settings["requests"], model.device)
        return soft_adapter(model, tokenizer, settings["encoder"], detectors)


def overlap_with_earlier(factors: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> Tensor:
    """Sum over earlier requests and modules of ||A_t A^T||_F^2, scalar; 0 where rows are orthogonal.

    Args:
        factors: `lora_A` weights by module.
        earlier: the same by `request/module`.
    """
    import torch

    from llm_unlearn.approximate.losses import orthogonality

    parts = [
        orthogonality(known.to(factors[name.split("/", 1)[1]]), factors[name.split("/", 1)[1]])
        for name, known in earlier.items()
    ]
    return torch.stack(parts).sum()


def _settings(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "wrapper.json").read_bytes())
