"""The detectors of O3's requests, each with its own backbone: made, written and read back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from llm_unlearn.approximate.detector import Calibration, Detector, split_rows
from llm_unlearn.approximate.detector_training import (
    BackboneTraining,
    TunedEncoder,
    load_backbone,
    train_backbone,
)
from llm_unlearn.approximate.encoder import BaseEncoder, Encoder, load_encoder
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.soft_adapter import SoftAdapter, lower_layers, row_features
from llm_unlearn.data.encoding import Example

DETECTORS = "detectors.safetensors"
BACKBONES = "backbones.safetensors"


@dataclass(frozen=True)
class RequestDetector:
    """What decides how much of the adapter a prompt gets, of one request.

    Attributes:
        backbone: the LoRA that its text encoder was trained with; empty: it is as it came.
    """

    detector: Detector
    backbone: Mapping[str, Tensor]


def make_detector(
    session: Session, answers: str, calibration: Calibration, training: BackboneTraining | None
) -> RequestDetector:
    """Train the backbone and fit the detector on some of the records, calibrate with the others.

    Args:
        answers: the side with the forget set's prompts and other answers.
        training: of `session.encoder`; None: it is taken as it is.
    """
    pairs = zip(session.sides[answers], session.sides["forget"], strict=True)
    records = [[_prompt(answer), example.input_ids] for answer, example in pairs]
    name, tokenizer, seed = session.encoder, session.tokenizer, session.config.seed
    model = session.model
    used, held_out = split_rows(len(records), calibration.held_out, seed)
    backbone: Mapping[str, Tensor] = {}
    if name is None or training is None:
        encoder = (
            BaseEncoder(model, tokenizer) if name is None else load_encoder(name, model.device)
        )
    else:
        tuned, own = load_backbone(name, model.device, seed)
        layers = lower_layers(TunedEncoder(tuned, own, {}))
        whole = [records[number][1] for number in used]
        texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
        backbone = train_backbone(tuned, own, texts, layers, training, seed)
        encoder = TunedEncoder(tuned, own, backbone)
    rows = [row for record in records for row in record]
    features = row_features(encoder, tokenizer, rows, lower_layers(encoder))
    features_NVLD = features.unflatten(0, (len(records), -1))  # V: the prompt alone, all of it
    used_NLD, held_out_MLD = (features_NVLD[part].flatten(0, 1) for part in (used, held_out))
    return RequestDetector(Detector.fit(used_NLD, held_out_MLD, calibration), backbone)


def _prompt(example: Example) -> list[int]:
    return example.input_ids[: next(i for i, label in enumerate(example.labels) if label >= 0)]


def soft_adapter(
    model: Any, tokenizer: Any, name: str | None, requests: Sequence[RequestDetector]
) -> SoftAdapter:
    """The adapter behind the detectors of all requests.

    Args:
        name: of the text encoder; None: the model itself.
    """
    detectors = [request.detector for request in requests]
    return SoftAdapter(
        model, tokenizer, detectors, list(_encoders(model, tokenizer, name, requests))
    )


def _encoders(
    model: Any, tokenizer: Any, name: str | None, requests: Sequence[RequestDetector]
) -> Iterator[Encoder]:
    """One for each request, on one model for those that were trained and one for those that were not."""
    plain = tuned = None
    for request in requests:
        if request.backbone and name is not None:
            tuned = tuned or load_backbone(name, model.device)
            yield TunedEncoder(*tuned, request.backbone)
        elif name is not None:
            plain = plain or load_encoder(name, model.device)
            yield plain
        else:
            plain = plain or BaseEncoder(model, tokenizer)
            yield plain


def detector_files(requests: Sequence[RequestDetector]) -> dict[str, bytes]:
    """The files that hold them, by name."""
    detectors = numbered([request.detector.tensors() for request in requests])
    backbones = numbered([request.backbone for request in requests])
    return {DETECTORS: save(detectors), BACKBONES: save(backbones)}


def read_detectors(directory: Path, count: int, device: Any = "cpu") -> list[RequestDetector]:
    """Those of a directory's requests, in order."""
    detectors, backbones = load_file(directory / DETECTORS), load_file(directory / BACKBONES)
    return [
        RequestDetector(
            Detector.from_tensors(of_request(detectors, number), device),
            of_request(backbones, number),
        )
        for number in range(count)
    ]


def numbered(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several requests in one dictionary, as `request/name`."""
    return {
        f"{number}/{name}": tensor.contiguous()
        for number, tensors in enumerate(requests)
        for name, tensor in tensors.items()
    }


def of_request(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One request's part of what `numbered` gave."""
    head = f"{number}/"
    return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
