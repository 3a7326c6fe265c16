"""What recipes/unlearn.py does: where data and model come from, requests in a row, what is shown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
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
    from llm_unlearn.approximate.unlearn import Report, Watching
    from llm_unlearn.approximate.watch import Standing
    from llm_unlearn.evaluation.harness import Session as Evaluating
    from llm_unlearn.evaluation.results import Evaluation

CURVE_NAME = "curve.json"


@dataclass
class RequestArguments:
    """What is to be forgotten and kept, and by which model. Without data: the demonstration."""

    forget: list[str] | None = field(
        default=None,
        metadata={"help": "What to forget: file or Hub dataset NAME[:CONFIG[:SPLIT]]."},
    )
    retain: str | None = field(default=None, metadata={"help": "What to keep, likewise."})
    run: str | None = field(
        default=None, metadata={"help": "Take both from the records of this exact run."}
    )
    subject: list[str] | None = field(
        default=None, metadata={"help": "--run: whom to forget; the others are kept."}
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
    if arguments.sequential and arguments.growing:
        raise UserError("give --sequential or --growing, not both")
    if arguments.run:
        if arguments.forget or arguments.retain:
            raise UserError("--run brings its own records: leave --forget and --retain out")
        return _from_run(arguments)
    if arguments.subject:
        raise UserError("--subject is for --run: it names whose records of the run to forget")
    sets = [read_source(source) for source in arguments.forget or ()]
    retain = read_source(arguments.retain) if arguments.retain else []
    if len(sets) > 1 and not (arguments.sequential or arguments.growing):
        sets = [[record for one in sets for record in one]]
    if arguments.drop_overlap:
        known = {tuple(record.texts()) for one in sets for record in one}
        retain = [record for record in retain if tuple(record.texts()) not in known]
    if arguments.growing:
        _check_nested(sets)
    return [Request(f"request-{i + 1}", one, retain) for i, one in enumerate(sets)]


def _check_nested(sets: Sequence[Sequence[Record]]) -> None:
    for number, (smaller, larger) in enumerate(pairwise(sets), start=2):
        if not {record.id for record in smaller} <= {record.id for record in larger}:
            raise UserError(
                f"--growing: forget set {number} does not hold the one before it: give nested sets, or "
                "--sequential"
            )


def _from_run(arguments: RequestArguments) -> list[Request]:
    from llm_unlearn.exact.run import S3TRun

    if not arguments.subject:
        raise UserError("whom should the model forget? Give --subject, as often as needed")
    slices = S3TRun.open(str(arguments.run)).directory.slices
    records = [record for name in slices.names for record in slices.read(name)]
    if missing := set(arguments.subject) - {record.subject for record in records}:
        raise UserError(f"{arguments.run} holds no records of {min(missing)!r}")
    everybody = set(arguments.subject)
    retain = [record for record in records if record.subject not in everybody]
    groups = [[name] for name in arguments.subject] if arguments.sequential else [list(everybody)]
    if arguments.growing:
        groups = [arguments.subject[: i + 1] for i in range(len(arguments.subject))]
    return [
        Request(f"request-{i + 1}", [r for r in records if r.subject in set(group)], retain)
        for i, group in enumerate(groups)
    ]


def load_trainable(
    name_or_path: str, adapter: str | None, any_base: bool, model_arguments: "ModelConfig"
) -> tuple[Any, Any]:
    """The fine-tuned model, whose adapter (if it has one) goes on being trained, and its tokenizer.

    What an earlier request left to answer through is around it: methods that cannot go on from there
    say so.

    Args:
        name_or_path: a model, or an adapter's directory.

    Raises:
        UserError: it cannot be loaded, or the adapter was trained on another base.
    """
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

    output = Path(str(config.output_dir))
    many = len(requests) > 1
    source, adapter = str(model_arguments.model_name_or_path), arguments.adapter
    watching = make_watching(arguments)
    reports = []
    for number, request in enumerate(requests):
        if number and arguments.sequential:
            source, adapter = str(output / requests[number - 1].name), None
        where = output / request.name if many else output
        model, tokenizer = load_trainable(source, adapter, arguments.any_base, model_arguments)
        one = replace(config, output_dir=str(where))
        with console.steps_progress(request.name if many else config.method, show_progress) as say:
            reports.append(
                unlearn(
                    model, tokenizer, request.forget, request.retain, one, replace(method),
                    lora_of(model_arguments), watching, arguments.encoder, say,
                )
            )  # fmt: skip
    if many and arguments.eval_suite:
        write_curve(arguments, output, requests)
    return reports


def make_watching(arguments: RequestArguments) -> "Watching | None":
    """Evaluation during training on the part of a suite that its verdict rests on."""
    from llm_unlearn.approximate.unlearn import Watching
    from llm_unlearn.evaluation.harness import saved_evaluation

    if arguments.eval_suite is None:
        if arguments.retrain_scores:
            raise UserError("--retrain_scores belong to a suite: give --eval_suite")
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
