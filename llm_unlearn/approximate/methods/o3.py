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

    from llm_unlearn.approximate.encoder import Encoder
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record

ANSWER = "forget/answer"
EARLIER = "earlier.safetensors"
DETECTORS = "detectors.safetensors"


@dataclass
class O3(Method):
    """L = CE(refusal | forget prompt) + orthogonality * sum over earlier t of ||A_t A^T||_F^2."""

    orthogonality: float = flag(0.1, "weight of the overlap with the adapters of earlier requests")
    target: str = flag(
        "refusal", "what is learnt instead: refusal, or wrong (a forget record's other answer)"
    )
    refusals: str | None = refusals_flag()
    earlier: str = flag(
        "", "directory that the request before wrote (default: the given model's own)"
    )
    gamma: float = flag(1000.0, "of the detector: weight of the nearest text's cosine")
    held_out: float = flag(0.3, "part of the forget records that the detector is calibrated with")
    quantile: float = flag(0.05, "of the held-out scores, from which the adapter is half on")
    margin: float = flag(0.5, "standard deviations below that quantile")
    steepness: float = flag(4.0, "of the adapter's weight, by standard deviation")

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
        "of the forget texts, from which they may be told; its file must be kept as they would be.",
        differs="Scores have one sign (the code adds a distance where it should subtract), means leave out "
        "padding, covariances are shrunk, the weight is one-sided: sigmoid(steepness * (score - threshold)) "
        "with the threshold from held-out forget texts. Cosines are of features less their mean. Layers are "
        "averaged in units of held-out spread instead of a one-class SVM. The detector's backbone "
        "is the base model, or a text encoder (--encoder) as it is: the paper trains one. Rows of a batch "
        "have their own weights.",
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
        if not (0 < self.held_out < 1 and 0 <= self.quantile <= 1):
            raise UserError("--held_out is between 0 and 1, and so is --quantile")
        self._factors: dict[str, Tensor] = {}  # lora_A weights by module
        self._earlier: dict[str, Tensor] = {}  # the same by request/module

    def start_from(self, model: Any) -> Any:
        return getattr(model, "adapted", model)

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        forget, seed = session.forget, session.config.seed
        if self.target == "wrong":
            return {ANSWER: mismatched(forget, forget, seed)}
        return {ANSWER: refused(forget, self.refusals, seed)}

    def prepare(self, session: Session) -> None:
        from safetensors.torch import load_file

        if not session.tuned.is_adapter:
            raise UserError("O3 weighs an adapter by row, and --full leaves none: take --full away")
        if len(session.forget) < 2:
            raise UserError(
                "O3's detector needs two forget records at least, one to calibrate with"
            )
        trained = session.tuned.trainable.items()
        self._factors = {name: factor for name, factor in trained if ".lora_A." in name}
        directory = self._directory(session)
        if directory is None:
            return
        if not (directory / EARLIER).is_file():
            raise UserError(f"{directory} was not written by --method o3: it has no {EARLIER}")
        self._earlier = load_file(directory / EARLIER, device=str(session.model.device))
        last = len({name.split("/")[0] for name in self._earlier}) - 1
        for name, factor in self._factors.items():
            known = self._earlier.get(f"{last}/{name}")
            if known is None or known.shape != factor.shape or not known.equal(factor.to(known)):
                raise UserError(
                    f"the model does not come with the adapter in {directory}: give that one"
                )

    def _directory(self, session: Session) -> Path | None:
        given = self.earlier or getattr(session.model, "written_in", "")
        return Path(given) if given else None

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
        from safetensors.torch import load_file, save

        directory = self._directory(session)
        known = load_file(directory / DETECTORS) if directory else {}
        settings = json.loads((directory / "wrapper.json").read_bytes()) if directory else {}
        if directory and settings["encoder"] != session.encoder:
            raise UserError(
                f"the detectors in {directory} are of --encoder {settings['encoder']}: give it"
            )
        number = settings.get("requests", 0)
        detector = self._detector(session)
        known |= {f"{number}/{name}": tensor for name, tensor in detector.tensors().items()}
        now = {f"{number}/{name}": a.detach().clone() for name, a in self._factors.items()}
        stored = {name: tensor.cpu().contiguous() for name, tensor in (self._earlier | now).items()}
        told = {"method": "o3", "requests": number + 1, "encoder": session.encoder}
        session.extra_files |= {
            "wrapper.json": json.dumps(told).encode(), EARLIER: save(stored), DETECTORS: save(known),
        }  # fmt: skip
        session.notes.append(
            f"{DETECTORS} holds statistics of the forget texts of {number + 1} requests: guard it as them"
        )

    def _detector(self, session: Session) -> Any:
        from llm_unlearn.approximate.detector import Calibration, Detector, split_rows
        from llm_unlearn.approximate.soft_adapter import lower_layers, row_features

        encoder = _encoder(session.encoder, session.model, session.tokenizer)
        numbers = Calibration(self.gamma, self.held_out, self.quantile, self.margin, self.steepness)
        count = len(session.forget)
        rows = [view for number in range(count) for view in _views(session, number)]
        features = row_features(encoder, session.tokenizer, rows, lower_layers(encoder))
        features_NVLD = features.unflatten(0, (count, -1))  # V views of a record
        used, held_out = split_rows(count, self.held_out, session.config.seed)
        used_NLD, held_out_MLD = (features_NVLD[part].flatten(0, 1) for part in (used, held_out))
        return Detector.fit(used_NLD, held_out_MLD, numbers)

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, directory: Path, settings: Mapping[str, Any]) -> Any:
        from safetensors.torch import load_file

        from llm_unlearn.approximate.detector import Detector
        from llm_unlearn.approximate.soft_adapter import SoftAdapter, lower_layers

        tensors = load_file(directory / DETECTORS)
        encoder = _encoder(settings["encoder"], model, tokenizer)
        detectors = []
        for number in range(settings["requests"]):
            head = f"{number}/"
            mine = {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
            detectors.append(Detector.from_tensors(mine, model.device))
        model.written_in = str(directory)
        return SoftAdapter(model, tokenizer, detectors, encoder, lower_layers(encoder))


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


def _views(session: Session, number: int) -> list[list[int]]:
    """A record as it is asked about: its prompt alone, and all of it."""
    example = session.sides["forget"][number]
    prompt = session.sides[ANSWER][number]
    length = next(place for place, label in enumerate(prompt.labels) if label >= 0)
    return [prompt.input_ids[:length], example.input_ids]


def _encoder(name: str | None, model: Any, tokenizer: Any) -> Encoder:
    from llm_unlearn.approximate.encoder import BaseEncoder, load_encoder

    return BaseEncoder(model, tokenizer) if name is None else load_encoder(name, model.device)
