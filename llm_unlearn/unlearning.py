"""What recipes/unlearn.py does: where data and model come from, requests in a row, what is shown."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import console
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.data.sources import SUFFIXES, read_hub_rows, read_rows
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import ModelConfig

    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.method import Method
    from llm_unlearn.approximate.result import Report
    from llm_unlearn.approximate.unlearn import Watching
    from llm_unlearn.approximate.watch import Standing
    from llm_unlearn.evaluation.harness import Session as Evaluating
    from llm_unlearn.evaluation.results import Evaluation

CURVE_NAME = "curve.json"


class Gather(argparse.Action):
    """Several values, after one flag or after the same flag again; they replace those of a file."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        known = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if known is self.default else [*known, *values])


@dataclass
class RequestArguments:
    """What is to be forgotten and kept, and by which model. Without data: the demonstration."""

    forget: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to forget: files or Hub datasets NAME[:CONFIG[:SPLIT]].",
            "action": Gather,
        },
    )
    retain: str | None = field(default=None, metadata={"help": "What to keep, likewise."})
    run: str | None = field(
        default=None, metadata={"help": "Take both from the records of this exact run."}
    )
    subject: list[str] | None = field(
        default=None,
        metadata={"help": "--run: whom to forget; the others are kept.", "action": Gather},
    )
    drop_overlap: bool = field(
        default=False, metadata={"help": "Leave records that are to be forgotten out of --retain."}
    )
    sequential: bool = field(
        default=False,
        metadata={
            "help": "Each forget set is a request, answered with the model that the last left."
        },
    )
    growing: bool = field(
        default=False, metadata={"help": "Nested forget sets, each from the same model."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "The LoRA that the fine-tuned model has on its base."}
    )
    any_base: bool = field(
        default=False, metadata={"help": "Take --adapter though it names another base model."}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Text encoder for icu and o3 (the model itself)."}
    )
    track_memorization: bool = field(
        default=False,
        metadata={"help": "Keep what training shows of each record, beside the result."},
    )
    eval_suite: str | None = field(
        default=None,
        metadata={"help": "Evaluate after each epoch: demo, muse-news, tofu, a folder."},
    )
    forget_split: str = field(default="forget10", metadata={"help": "--eval_suite tofu: authors."})
    retrain_scores: str | None = field(
        default=None,
        metadata={"help": "results.json of a retrained model on that suite: floor and target."},
    )
    as_json: bool = field(default=False, metadata={"help": "--json: print reports for machines."})

    def __post_init__(self) -> None:
        self.forget = [self.forget] if isinstance(self.forget, str) else self.forget
        self.subject = [self.subject] if isinstance(self.subject, str) else self.subject
        if self.run and (self.forget or self.retain):
            raise UserError("--run brings its own records: leave --forget and --retain out")
        if self.run and not self.subject:
            raise UserError("whom should the model forget? Give --subject, as often as needed")
        if self.subject and not self.run:
            raise UserError("--subject is for --run: it names whose records of the run to forget")
        if self.retain and not self.forget:
            raise UserError("--retain says what to keep; what is to be forgotten? Give --forget")
        if self.sequential and self.growing:
            raise UserError("give --sequential or --growing, not both")
        if self.retrain_scores and not self.eval_suite:
            raise UserError("--retrain_scores belong to a suite: give --eval_suite")

    @property
    def is_demonstration(self) -> bool:
        return not (self.forget or self.run)


@dataclass(frozen=True)
class Request:
    """One forget set, what is kept beside it, and what to call it."""

    name: str
    forget: list[Record]
    retain: list[Record]


def read_source(
    source: str, subject_column: str | None = None, rows_per_subject: int | None = None
) -> list[Record]:
    """Records of a file, or of a Hub dataset `NAME[:CONFIG[:SPLIT]]`.

    Raises:
        UserError: see `read_rows`, `read_hub_rows` and `make_records`.
    """
    if Path(source).suffix in SUFFIXES:
        return make_records(read_rows(source), subject_column, rows_per_subject)
    if Path(source).exists():
        raise UserError(f"{source}: expected a file of kind {', '.join(SUFFIXES)}")
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    rows = read_hub_rows(name, config or None, split or "train")
    return make_records(rows, subject_column, rows_per_subject)


def requests_of(arguments: RequestArguments) -> list[Request]:
    """The requests that the flags name, in order.

    Raises:
        UserError: data that is missing, contradicts itself, or subjects that do not exist.
    """
    sets, retain = _of_run(arguments) if arguments.run else _of_files(arguments)
    if arguments.growing:
        _check_nested(sets)
    elif not arguments.sequential:
        sets = [[record for one in sets for record in one]]
    if arguments.drop_overlap:
        known = {tuple(record.texts()) for one in sets for record in one}
        retain = [record for record in retain if tuple(record.texts()) not in known]
    return [Request(f"request-{i + 1}", one, retain) for i, one in enumerate(sets)]


def _of_files(arguments: RequestArguments) -> tuple[list[list[Record]], list[Record]]:
    """The forget sets, and what is kept."""
    sets = [read_source(source) for source in arguments.forget or ()]
    return sets, read_source(arguments.retain) if arguments.retain else []


def _of_run(arguments: RequestArguments) -> tuple[list[list[Record]], list[Record]]:
    """A forget set for each subject (growing: with those before), and everybody else's records."""
    from llm_unlearn.data.partition import CORE
    from llm_unlearn.exact.run import S3TRun

    directory = S3TRun.open(str(arguments.run)).directory
    names = [*directory.slices.names, *([CORE] if directory.core else [])]
    # Public keys put a record into several shards.
    records = {r.id: r for name in names for r in directory.slices.read(name)}.values()
    subjects = list(dict.fromkeys(arguments.subject or ()))
    if missing := set(subjects) - {record.subject for record in records}:
        raise UserError(f"{arguments.run} holds no records of {min(missing)!r}")
    sets = [[record for record in records if record.subject == name] for name in subjects]
    if arguments.growing:
        sets = list(accumulate(sets, lambda smaller, more: [*smaller, *more]))
    return sets, [record for record in records if record.subject not in subjects]


def _check_nested(sets: Sequence[Sequence[Record]]) -> None:
    for number, (smaller, larger) in enumerate(pairwise(sets), start=2):
        if not {record.id for record in smaller} <= {record.id for record in larger}:
            raise UserError(
                f"--growing: forget set {number} does not hold the one before it: give nested sets, or "
                "--sequential"
            )


def load_trainable(
    name_or_path: str, adapter: str | None, any_base: bool, model_arguments: "ModelConfig"
) -> tuple[Any, Any]:
    """The fine-tuned model, whose adapter (if it has one) goes on being trained, and its tokenizer; with the
    ledger of how far earlier requests took it.

    What an earlier request left to answer through is around it: methods that cannot go on from there
    say so.

    Args:
        name_or_path: a model, or an adapter's directory; with the wrapper that a method left there.

    Raises:
        UserError: it cannot be loaded, or the adapter was trained on another base.
    """
    from llm_unlearn.approximate.travelled import take_up
    from llm_unlearn.exact.base_model import load_base
    from llm_unlearn.models import base_of_adapter, with_adapter, wrapped

    path = Path(adapter or name_or_path)
    if adapter is None and (path / "adapter_config.json").is_file():
        name_or_path, adapter = base_of_adapter(path), name_or_path
    elif adapter is not None and not any_base:
        _check_base(adapter, name_or_path)
    options = {
        "dtype": model_arguments.dtype,
        "attn_implementation": model_arguments.attn_implementation,
    }
    model, tokenizer = load_base(name_or_path, model_arguments.model_revision, options)
    if adapter is not None:
        model = with_adapter(model, adapter, trainable=True)
    take_up(model, path)
    return wrapped(model, tokenizer, path), tokenizer


def _check_base(adapter: str, base: str) -> None:
    from llm_unlearn.models import base_of_adapter

    if not (Path(adapter) / "adapter_config.json").is_file():
        return  # on the Hub: its own loader says what is wrong
    told = base_of_adapter(Path(adapter))
    same = told == base or (Path(told).exists() and Path(told).resolve() == Path(base).resolve())
    if not same:
        raise UserError(
            f"the adapter {adapter} was trained on {told}, not on {base}: give --model_name_or_path "
            f"{told}, or --any_base if they are the same model"
        )


def base_name(arguments: RequestArguments, name_or_path: str | None) -> str:
    """What the base model of the result is called: the model's own base, if it is an adapter."""
    from llm_unlearn.models import base_of_adapter

    path = Path(name_or_path or "")
    is_adapter = arguments.adapter is None and (path / "adapter_config.json").is_file()
    return base_of_adapter(path) if is_adapter else str(path)


def lora_of(model_arguments: "ModelConfig") -> "LoraConfig":
    """The shape of a fresh adapter: TRL's flags, all linear layers, no dropout unless asked for."""
    from peft import LoraConfig

    return LoraConfig(
        r=model_arguments.lora_r,
        lora_alpha=model_arguments.lora_alpha,
        lora_dropout=model_arguments.lora_dropout,
        target_modules=model_arguments.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def answer_requests(
    arguments: RequestArguments,
    config: "UnlearningConfig",
    model_arguments: "ModelConfig",
    method: "Method",
    requests: Sequence[Request],
    show_progress: bool = True,
) -> list["Report"]:
    """Unlearn one request after the other, each into a directory of its own where there are several."""
    from llm_unlearn.approximate.unlearn import unlearn
    from llm_unlearn.memorization.observations import Observations
    from llm_unlearn.memorizing.scoring import keep_observations

    output = Path(str(config.output_dir))
    many = len(requests) > 1
    source, adapter = str(model_arguments.model_name_or_path), arguments.adapter
    places = [output / request.name if many else output for request in requests]
    for place in places:
        check_output(place, [source, adapter or source])
    watching = make_watching(arguments)
    reports = []
    for request, place in zip(requests, places, strict=True):
        model, tokenizer = load_trainable(source, adapter, arguments.any_base, model_arguments)
        one = replace(config, output_dir=str(place))
        observer = Observations() if arguments.track_memorization else None
        with console.steps_progress(request.name if many else config.method, show_progress) as say:
            reports.append(
                unlearn(
                    model, tokenizer, request.forget, request.retain, one, replace(method),
                    lora_of(model_arguments), watching, arguments.encoder, say, observer,
                )
            )  # fmt: skip
        if observer is not None:
            keep_observations(place, [*request.forget, *request.retain], observer, model, one)
        if arguments.sequential:
            source, adapter = str(place), None
    if many and arguments.eval_suite:
        write_curve(arguments, output, requests)
    return reports


def check_output(output: Path, sources: Sequence[str]) -> None:
    """A model that is there is not written over, unless it is an earlier result."""
    from llm_unlearn.approximate.result import REPORT_NAME

    if any(Path(one).exists() and Path(one).resolve() == output.resolve() for one in sources):
        raise UserError(f"{output} holds the model that is to forget: choose another --output_dir")
    is_model = any((output / name).exists() for name in ("config.json", "adapter_config.json"))
    if is_model and not (output / REPORT_NAME).exists():
        raise UserError(f"{output} holds another model: choose another --output_dir")
    if any(path.is_file() for path in (output, *output.parents)):
        raise UserError(f"--output_dir {output} is a file: choose a directory")


def make_watching(arguments: RequestArguments) -> "Watching | None":
    """Evaluation during training on the part of a suite that its verdict rests on."""
    from llm_unlearn.approximate.unlearn import Watching
    from llm_unlearn.evaluation.harness import saved_evaluation

    if arguments.eval_suite is None:
        return None
    session, whole = _evaluating(arguments)
    retrained = None
    if arguments.retrain_scores:
        earlier = saved_evaluation(Path(arguments.retrain_scores), whole, prefer="retrained")
        retrained = _standing(session, earlier)

    def evaluate(model: Any, tokenizer: Any) -> "Standing":
        return _standing(session, session.ask(model, tokenizer, "model", "", ""))

    return Watching(evaluate, retrained)


def _evaluating(arguments: RequestArguments) -> tuple["Evaluating", "Evaluating"]:
    """The suite's probes alone, and the whole suite, whose digest earlier scores carry."""
    from llm_unlearn.evaluation.harness import Options, Session
    from llm_unlearn.evaluation.suites.loading import load_suite
    from llm_unlearn.evaluation.suites.suite import only_probes

    suite = load_suite(str(arguments.eval_suite), arguments.forget_split)
    return Session(only_probes(suite), Options()), Session(suite, Options())


def _standing(session: "Evaluating", evaluation: "Evaluation") -> "Standing":
    """What the suite's questions about the forgotten and about the others find: MUSE's C2 and C4."""
    import numpy as np

    from llm_unlearn.approximate.watch import Standing

    def mean(columns: Sequence[tuple[str, str]]) -> float:
        values = [np.nanmean(evaluation.records[section][name]) for section, name in columns]
        return float(np.mean(values))

    probes = session.suite.probes
    leaks = [column for column in probes.leaks if column[0] == probes.answers]
    return Standing(forget=mean(leaks), utility=mean(probes.utility))


def write_curve(
    arguments: RequestArguments, output: Path, requests: Sequence[Request]
) -> list[dict[str, Any]]:
    """Utility and what is left of the forget set after each request: MUSE's C5 (growing) and C6.

    Returns:
        `request`, `forgotten` (rows so far), `forget`, `utility`; also written to `curve.json`.
    """
    from accelerate import PartialState

    from llm_unlearn import files
    from llm_unlearn.evaluation import folds
    from llm_unlearn.models import load_model

    session, _ = _evaluating(arguments)

    def measure(path: str) -> "Standing":
        loaded = load_model(path)
        return _standing(session, session.ask(loaded.model, loaded.tokenizer, "model", path, ""))

    # The models are there already: what unlearns is the choice of the next directory.
    paths = iter([str(output / request.name) for request in requests])
    sets = [[record.id for record in request.forget] for request in requests]
    if arguments.growing:
        steps = folds.scalability(lambda _, __: next(paths), lambda: "", sets, measure)
    else:
        steps = folds.sustainability(lambda _, __: next(paths), "", sets, measure)
    rows = [
        {"request": request.name, "forgotten": step.forgotten, **vars(step.score)}
        for request, step in zip(requests, steps, strict=True)
    ]
    if PartialState().is_main_process:
        files.write_bytes(output / CURVE_NAME, json.dumps(rows, indent=1).encode(), mode=0o644)
    return rows
