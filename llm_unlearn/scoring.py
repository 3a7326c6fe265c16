"""What eval/muse.py and eval/tofu.py share: flags, loading, decoys, the table and the report."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import console
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

    from llm_unlearn.evaluation.harness import Candidate, Reference, Session
    from llm_unlearn.evaluation.results import Results, Value
    from llm_unlearn.evaluation.suites.suite import Suite

DECOYS = ("redirect", "refuse", "destroyed")
DEMONSTRATION_RUN = Path("runs/demonstration")


def make_parser(description: str, suites: str, profiles: str) -> argparse.ArgumentParser:
    """The flags of an evaluation; nothing heavy is imported, so that --help is quick."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        help="a model (Hub or directory), a PEFT adapter, a run, or its served directory "
        f"(default: {DEMONSTRATION_RUN} where it exists)",
    )
    group.add_argument("--adapter", help="a PEFT adapter to put on --model")
    group.add_argument("--revision", help="of a model on the Hub")
    group.add_argument("--dtype", help="float32 (default), bfloat16, ...")
    group.add_argument("--attn_implementation", help="sdpa, eager, flash_attention_2, ...")
    for name, what in (
        ("retrain", "a model trained without the forget set: PrivLeak, forget quality and the "
         "verdict are measured against it"),
        ("before", "the model before unlearning: the positive control"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", help=what)
        group.add_argument(
            f"--{name}_scores", type=Path, help="its results.json (or directory) instead"
        )
    group = parser.add_argument_group("suite")
    group.add_argument("--suite", default="demo", help=suites)
    group.add_argument(
        "--forget_subject",
        action="append",
        default=[],
        help="demo: whom the model should have forgotten; repeatable (default: who was deleted "
        "from the run, else the first twelve people)",
    )
    group.add_argument("--profile", default="default", help=profiles)
    group.add_argument("--template", help="question, plain or chat (default: the suite's)")
    group.add_argument("--system_prompt", help="chat: what a conversation begins with")
    group.add_argument("--date_string", help="chat: the date that some templates print")
    group.add_argument(
        "--gradient_norm", action="store_true", help="the gradient-norm attack too (slow)"
    )
    group.add_argument(
        "--decoys",
        action="store_true",
        help="test the harness itself: three fakes made from --before must be caught",
    )
    for name, what in (("scalability", "nested, growing"), ("sustainability", "successive")):
        group.add_argument(
            f"--{name}", nargs="+", default=[], metavar="MODEL",
            help=f"models after {what} requests, in order: their utility as a curve",
        )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, help="default: evaluations/SUITE")
    group.add_argument("--batch_size", type=int, help="default: as many rows as fit")
    group.add_argument(
        "--show_text",
        action="store_true",
        help="keep what the models said in results.json and the report: it is personal",
    )
    group.add_argument("--json", action="store_true", help="print results as JSON")
    return parser


def run(arguments: argparse.Namespace, load_suite: Callable[[Sequence[str]], "Suite"]) -> None:
    """Evaluate as the flags say.

    Args:
        load_suite: makes the suite, given names of forgotten people for the demonstration.
    """
    from llm_unlearn.evaluation.harness import finish, run_session
    from llm_unlearn.evaluation.report import write_report

    quiet()
    state = processes()
    name = model_name(arguments)
    suite = load_suite(forgotten(arguments, name))
    _can_make_decoys(arguments, suite)
    output = arguments.output_dir or Path("evaluations", Path(arguments.suite).name)
    with console.evaluation_progress(state.is_main_process and not arguments.json) as progress:
        session = make_session(arguments, suite, output, progress)
        model = candidate(arguments, name, arguments.adapter)
        references = _references(arguments, session)
        results = run_session(session, model, references)
        if arguments.decoys:
            _add_decoys(arguments, session, results)
        for curve in ("scalability", "sustainability"):
            results.curves |= _curve(arguments, session, curve, getattr(arguments, curve))
    finish(results, output, arguments.show_text)
    if not state.is_main_process:
        return
    write_report(results, output / "report.html", show_text=arguments.show_text)
    show(results, output, arguments.json, arguments.show_text)


def show(results: "Results", output: Path, as_json: bool, with_texts: bool = False) -> None:
    """The table for people, or everything for machines."""
    if as_json:
        console.print_json(results.to_dict(with_texts))
        return
    print_results(results)
    console.stdout.print(f"written: {output}/results.json, {output}/report.html", highlight=False)


def make_session(
    arguments: argparse.Namespace, suite: "Suite", output: Path, progress: Any
) -> "Session":
    from llm_unlearn.evaluation.harness import Options, Session
    from llm_unlearn.evaluation.prompts import Prompting

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    prompting = Prompting(
        arguments.template or suite.template, arguments.system_prompt, arguments.date_string
    )
    options = Options(
        profile=arguments.profile,
        prompting=prompting,
        batch_size=arguments.batch_size,
        with_gradients=arguments.gradient_norm,
        keep_texts=arguments.show_text,
    )
    options.resolve()
    output.mkdir(parents=True, exist_ok=True)
    return Session(suite, options, output, progress)


def candidate(arguments: argparse.Namespace, name: str, adapter: str | None = None) -> "Candidate":
    from llm_unlearn.evaluation.harness import Candidate
    from llm_unlearn.models import load_model

    # --revision is of --model: a reference is another repository.
    revision = arguments.revision if name == arguments.model else None

    def load() -> tuple[Any, Any]:
        loaded = load_model(name, adapter, revision, arguments.dtype, arguments.attn_implementation)
        return loaded.model, loaded.tokenizer

    return Candidate(f"{name} + {adapter}" if adapter else name, load)


def print_results(results: "Results") -> None:
    """One table: this model with its interval, the references, and the paired difference."""
    shown = [role for role in results.others if not role.startswith(DECOYS)]
    rows = []
    notes: dict[str, list[str]] = {}
    for name, value in results.model.values.items():
        if value.note:
            notes.setdefault(value.note, []).append(name)
            continue
        others = [_cell(results.others[role].values.get(name)) for role in shown]
        difference = results.differences.get(name)
        told = (difference.mean, difference.lower, difference.upper) if difference else ()
        row = (name, _cell(value), _interval(value.lower, value.upper), *others)
        rows.append((*row, _signed(told)) if results.differences else row)
    columns = ["metric", "model", "95 %", *shown]
    columns += [f"model less {d.versus}" for d in results.differences.values()][:1]
    console.print_table(f"{results.suite}, profile {results.profile}", columns, rows)
    say = partial(console.stdout.print, highlight=False, soft_wrap=True)
    for note, names in notes.items():
        say(f"not scored: {', '.join(names)}: {note}")
    for check in results.checks:
        if check.verdict == "failed":
            say(f"failed: {check.name}: {check.reason}", style="red")
        elif check.name.startswith("self-test"):
            say(f"{check.name}: {check.reason}")
    say(f"verdict: {results.verdict}", style="bold")


def _interval(lower: float, upper: float) -> str:
    return "" if lower != lower else f"{lower:.3g} to {upper:.3g}"


def _signed(difference: Sequence[float]) -> str:
    if not difference:
        return ""
    mean, lower, upper = difference
    return f"{mean:+.3f}" + ("" if lower != lower else f" [{lower:+.3f}, {upper:+.3f}]")


def _cell(value: "Value | None") -> str:
    if value is None or value.value != value.value:
        return "-"
    detail = f" (D {value.detail['D']:.3f}, n {value.n})" if "D" in value.detail else ""
    lost = f" ({value.n_unscorable} not scored)" if value.n_unscorable else ""
    return f"{value.value:.3g}{detail}{lost}"


def model_name(arguments: argparse.Namespace) -> str:
    if arguments.model:
        return arguments.model
    if (DEMONSTRATION_RUN / "run.json").is_file():
        return str(DEMONSTRATION_RUN)
    raise UserError(
        "which model? Give --model, or make the demonstration's run first: "
        "accelerate launch recipes/s3t.py"
    )


def forgotten(arguments: argparse.Namespace, model: str) -> list[str]:
    """For the demonstration: the names that were asked for, or who was deleted from the run."""
    from llm_unlearn.evaluation.suites.demonstration import NAME, deleted_names
    from llm_unlearn.models import run_of, subjects_in

    if arguments.forget_subject and arguments.suite != NAME:
        raise UserError("--forget_subject is for --suite demo: other suites bring their forget set")
    if arguments.forget_subject or arguments.suite != NAME:
        return arguments.forget_subject
    path = run_of(Path(model))
    return deleted_names(subjects_in(path)) if path else []


def _references(arguments: argparse.Namespace, session: "Session") -> dict[str, "Reference"]:
    from llm_unlearn.evaluation.harness import BEFORE, RETRAINED, saved_evaluation

    found: dict[str, Reference] = {}
    for role, flag in ((RETRAINED, "retrain"), (BEFORE, "before")):
        path, scores = getattr(arguments, flag), getattr(arguments, f"{flag}_scores")
        if path and scores:
            raise UserError(f"give --{flag} or --{flag}_scores, not both")
        if scores:
            found[role] = saved_evaluation(scores, session, prefer=role)
        elif path:
            found[role] = candidate(arguments, path)
    return found


def _can_make_decoys(arguments: argparse.Namespace, suite: "Suite") -> None:
    """What decoys need is known before any model is asked, which takes hours with a real one."""
    if not arguments.decoys:
        return
    if not arguments.before:
        raise UserError("--decoys are made from the model before unlearning: give --before")
    if not suite.subjects or not suite.others:
        raise UserError("--decoys need rows with a subject: this suite does not name anybody")


def _add_decoys(arguments: argparse.Namespace, session: "Session", results: "Results") -> None:
    from llm_unlearn.evaluation.self_test import add_decoys

    model, tokenizer = candidate(arguments, arguments.before).load()
    add_decoys(session, model, tokenizer, results)


def _curve(
    arguments: argparse.Namespace, session: "Session", name: str, models: Sequence[str]
) -> dict[str, list["Value"]]:
    from llm_unlearn.evaluation.suites.suite import only_utility

    if not models:
        return {}
    part = replace(session, suite=only_utility(session.suite), output=None)
    found = [
        part.conclude_values(part.evaluate(candidate(arguments, path), name)) for path in models
    ]
    return {name: [values[session.suite.utility] for values in found]}


def processes() -> "PartialState":
    """The processes that share the work. Without a GPU they only find each other when told so."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
