"""Make a fine-tuned language model forget, approximately. With no data flag: the demonstration.

accelerate launch recipes/unlearn.py --method NAME [flags]
python recipes/unlearn.py --method NAME --help     what the method is, when it fails, its own flags

The most used flags:
    --model_name_or_path M      fine-tuned weights (Hub or directory), or an adapter's directory
    --adapter DIR               the LoRA that M was fine-tuned with; it goes on being trained
    --forget DATA [DATA ...]    .json, .jsonl, .csv, .parquet, or a Hub dataset NAME[:CONFIG[:SPLIT]],
    --retain DATA               with text, prompt + completion, question + answer, or messages
    --drop_overlap              leave records that are to be forgotten out of --retain
    --run RUN --subject S ...   instead: an exact run's own records; S is forgotten, the others are kept
    --sequential, --growing     several forget sets: one request after another, or nested ones
    --output_dir OUT            the unlearned adapter or model with its card (runs/unlearned)
    --full                      train the weights, not a LoRA (a model with an adapter: merged first)
    --eval_suite SUITE          evaluate after each epoch: demo, muse-news, tofu, or a folder
    --retrain_scores FILE       results.json of a retrained model on that suite: floor and target
    --stop_when WHEN            stop there: utility_floor, or forget_at_retrain
    --keep best                 write the best state that was evaluated, not the last
    --stop_samples icu          leave out forget rows that are forgotten, round by round
    --retain_projection 0.95    PGU: take what retain inputs span out of every update
    --track_memorization        keep what training shows of each record: llm-unlearn memorization OUT
    --refine SCORE              RUM: the forget set in subsets, least memorized first (confidence,
                                accuracy, entropy, el2n, curvature, gain, holdout, ...)
    --refine_with M M M         a method for each subset, or none (--method for all)
    --refine_control CONTROL    shuffle (random subsets) or vanilla (all at once), in as many steps
    --push_to_hub, --hub_model_id REPO_ID    publish it (of several requests the last); no guarantee
    --json                      print the report for machines
    --config FILE.yaml          any of the flags from a file; the command line wins
and every training flag of Transformers and LoRA (--help_all). Flags that are not given come from the
method's paper; with LoRA its learning rate is multiplied by ten. What comes out carries no guarantee:
for a deletion that must be certain, use recipes/s3t.py.

Methods:
"""

import sys
from pathlib import Path

from llm_unlearn.console import print_json, print_table, run_and_exit, warn
from llm_unlearn.errors import UserError
from llm_unlearn.launch import (
    check_processes,
    config_of,
    expand_help,
    parse_flags,
    publish_result,
    wants_short_help,
)


def main(argv: list[str]) -> None:
    if wants_short_help(argv):
        show_help(argv)
        return
    from accelerate import PartialState
    from transformers.utils import logging

    from llm_unlearn.hub.publishing import check_flags
    from llm_unlearn.hub.unlearned import HIDDEN
    from llm_unlearn.unlearning import answer_requests, base_name, requests_of

    arguments, refinement, config, model_arguments, method = read_flags(argv)
    is_demonstration = arguments.is_demonstration
    if not is_demonstration and model_arguments.model_name_or_path is None:
        raise UserError("which model is to forget? Give --model_name_or_path")
    state = PartialState()
    check_processes(state.num_processes)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    speaks = state.is_main_process and not arguments.as_json
    check_flags(config, base_name(arguments, model_arguments.model_name_or_path))
    if config.push_to_hub and method.is_suppression:
        raise UserError(f"--push_to_hub is refused: {HIDDEN.format(method=config.method)}")
    requests = (
        prepare_demonstration(model_arguments, speaks)
        if is_demonstration
        else requests_of(arguments)
    )
    if refinement.refine:
        stages = read_stages(argv, refinement, config, method)
        reports = refined(arguments, refinement, stages, model_arguments, requests, speaks)
    else:
        reports = answer_requests(arguments, config, model_arguments, method, requests, speaks)
    if not state.is_main_process:
        return
    show_notes(reports)
    if arguments.as_json:
        print_json([report.to_dict() for report in reports])
        return
    show_reports(Path(config.output_dir), requests, reports)
    if len(requests) > 1 and arguments.eval_suite:
        show_curve(Path(config.output_dir))
    if config.push_to_hub:
        place = Path(config.output_dir)
        publish_result(config, place / requests[-1].name if len(requests) > 1 else place)
    if is_demonstration:
        show_demonstration(str(model_arguments.model_name_or_path), config.output_dir)


def read_stages(argv, refinement, config, method):
    """A stage for each subset with the flags of its method, and the whole set's last."""
    from llm_unlearn.memorizing.refining import NONE, Stage

    stages = []
    for name in refinement.methods(config.method):
        if name in (NONE, config.method):
            stages.append(Stage() if name == NONE else Stage(config, method))
            continue
        _, _, own_config, _, own = read_flags([*argv, "--method", name], partly=True)
        stages.append(Stage(own_config, own))
    return [*stages, Stage(config, method)]


def refined(arguments, refinement, stages, model_arguments, requests, speaks: bool):
    from llm_unlearn.console import attack_progress
    from llm_unlearn.memorizing.refined_requests import answer_refined

    if len(requests) > 1:
        raise UserError("--refine parts one forget set: leave --sequential and --growing out")
    with attack_progress(speaks) as say:
        return answer_refined(arguments, refinement, stages, model_arguments, requests[0], say)


def read_flags(argv: list[str], partly: bool = False):
    """What to do, how, by what training, with what model, and the method: the command line wins over the
    file, which wins over what the demonstration is started with.

    Args:
        partly: other methods' flags are let be.
    """
    from trl import ModelConfig, TrlParser

    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.methods import load_method
    from llm_unlearn.demonstration import unlearning_defaults
    from llm_unlearn.memorizing.refine_arguments import RefineArguments
    from llm_unlearn.unlearning import RequestArguments

    argv = ["--as_json" if argument == "--json" else argument for argument in argv]
    name = chosen_name(argv)
    types = [RequestArguments, RefineArguments, UnlearningConfig, ModelConfig, load_method(name)]
    parser = TrlParser(types, allow_abbrev=False)
    parser.set_defaults(lora_dropout=0.0)
    # The data flags first: the demonstration brings flags of its own, which a method may insist on.
    data_flags = TrlParser([RequestArguments], allow_abbrev=False, add_help=False)
    (asked,) = parse_flags(data_flags, argv, partly=True)
    if asked.is_demonstration:
        parser.set_defaults_with_config(**unlearning_defaults(name))
    return parse_flags(parser, expand_help(argv), partly)


def chosen_name(argv: list[str]) -> str:
    """The method; it is looked for before parsing, since its flags are among the parser's."""
    from llm_unlearn.approximate.methods import METHODS

    name = config_of(argv).get("method", "npo")
    for index, argument in enumerate(argv):
        if argument.startswith("--method="):
            name = argument.partition("=")[2]
        elif argument == "--method":
            name = "".join(argv[index + 1 : index + 2])
    if name not in METHODS:
        raise UserError(f"unknown --method {name!r}: one of {', '.join(METHODS)}")
    return name


def show_help(argv: list[str]) -> None:
    from llm_unlearn.approximate.cards import describe, one_line_each
    from llm_unlearn.approximate.methods import load_method

    if any(argument.split("=")[0] == "--method" for argument in argv):
        print(describe(load_method(chosen_name(argv))))
    else:
        print(__doc__ + one_line_each())


def show_notes(reports) -> None:
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        warn(note)


def show_reports(output: Path, requests, reports) -> None:
    """A line for each request; of a refinement, for each subset that a method unlearned."""
    from llm_unlearn.approximate.travelled import describe

    places = (
        [output / one.name for one in requests] if len(requests) > 1 else [output] * len(reports)
    )
    for where, report in zip(places, reports, strict=True):
        print(
            f"{where}: {report.forget_records} records unlearned with {report.method}, {report.steps} "
            f"steps in {report.seconds:.0f} s; {describe(report.travelled)}; no guarantee (see its README.md)"
        )


def show_curve(output: Path) -> None:
    import json

    from llm_unlearn.unlearning import CURVE_NAME

    rows = json.loads((output / CURVE_NAME).read_bytes())
    print_table(
        "After each request",
        ("", "forgotten rows", "still known of them", "utility"),
        [(r["request"], r["forgotten"], f"{r['forget']:.3f}", f"{r['utility']:.3f}") for r in rows],
    )


def prepare_demonstration(model_arguments, speaks: bool):
    """A model that knows the private people, of whom twelve are to be forgotten."""
    from llm_unlearn.console import steps_progress
    from llm_unlearn.demonstration import knowing_adapter, unlearning_records
    from llm_unlearn.unlearning import Request

    forget, retain = unlearning_records()
    if model_arguments.model_name_or_path is None:
        with steps_progress("fine-tuning the model that is to forget", speaks) as say:
            model_arguments.model_name_or_path = str(
                knowing_adapter(Path("runs/demonstration-fine-tuned"), [*forget, *retain], say)
            )
    return [Request("request-1", forget, retain)]


def show_demonstration(before: str, after: str) -> None:
    from llm_unlearn.demonstration import unlearning_table

    rows = [
        (moment, *(f"{value:.0%}" for value in values))
        for moment, values in unlearning_table({"before": before, "unlearned": after}).items()
    ]
    print_table(
        "Facts answered right", ("", "to be forgotten", "to be kept", "public people"), rows
    )
    print("try: python recipes/benchmark.py, which puts all methods beside exact unlearning")


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
