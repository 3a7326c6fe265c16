"""Does exact unlearning cost quality? Every exact method beside one plain LoRA and retraining.

    accelerate launch recipes/exact_study.py
        The small form on the embedded demonstration: 24 invented people, one seed, 0, 1 and 5 deletions;
        some twenty minutes on two CPU cores.

    accelerate launch recipes/exact_study.py --full
        48 people, three seeds, 0, 1, 5 and 20 deletions, every configuration: hours.

    python benchmarks/tofu_base.py --tofu tofu/full.json --skip_authors 60 --output_dir tofu-base
    accelerate launch recipes/exact_study.py --world tofu --tofu_path tofu --model tofu-base --full
        TOFU: the first 50 authors are private, 10 more are never trained on, and the small base model is
        pre-trained on the rest. --subjects 200 --model your-model works with any real model.

    --only NAME ...         some configurations (llm_unlearn/study/configurations.py is the table)
    --seeds N, --deletions 0 1 5 20, --subjects N    each by itself
    --passes N, --learning_rate X    the budget of every configuration (a real model wants 2e-4)
    --report_only           write results.json, study.html and summary.md again from what is measured
    --output_dir DIR        runs, measurements and page (studies/exact)

Interrupted? Run the same command again: it goes on where it was. Two at once share the work.
"""

import argparse
import shlex
import sys
from pathlib import Path

from llm_unlearn.console import print_table, run_and_exit, study_progress, warn
from llm_unlearn.launch import refuse_push, wants_short_help

SMALL = {"subjects": 24, "seeds": 1, "deletions": [0, 1, 5]}
FULL = {"subjects": 48, "seeds": 3, "deletions": [0, 1, 5, 20]}
TOFU_SUBJECTS = 50


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--world", choices=("demonstration", "tofu"), default="demonstration")
    parser.add_argument("--tofu_path", type=Path, default=Path("tofu"))
    parser.add_argument("--model")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--subjects", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--deletions", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--passes", type=float)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=Path("studies/exact"))
    arguments = parser.parse_args(argv)
    form = FULL if arguments.full else SMALL
    if arguments.world == "tofu":
        form = {**form, "subjects": TOFU_SUBJECTS}
    for name, value in form.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(argv: list[str]) -> None:
    if wants_short_help(argv):
        print(__doc__)
        return
    refuse_push(argv)
    arguments = read_arguments(argv)

    from llm_unlearn.study.page import print_headline, write_study
    from llm_unlearn.study.results import summarise

    if not arguments.report_only:
        run(arguments)
    results = summarise(arguments.output_dir)
    again = [argument for argument in argv if argument != "--report_only"]
    command = f"accelerate launch recipes/exact_study.py {shlex.join(again)}".strip()
    paths = write_study(results, arguments.output_dir, command)
    print_headline(results, print_table)
    print("written: " + ", ".join(map(str, paths)))


def run(arguments: argparse.Namespace) -> None:
    """Train and measure what is missing."""
    from llm_unlearn import scoring
    from llm_unlearn.study.configurations import select
    from llm_unlearn.study.plan import Study
    from llm_unlearn.study.running import run_study
    from llm_unlearn.study.worlds import load_world, model_for

    scoring.processes()
    scoring.quiet()
    budget = {"passes": arguments.passes, "learning_rate": arguments.learning_rate}
    study = Study(
        output=arguments.output_dir,
        world=load_world(arguments.world, arguments.subjects, arguments.tofu_path),
        model=model_for(arguments.world, arguments.model),
        configurations=select(arguments.only, small=not arguments.full),
        seeds=arguments.seeds,
        deletions=sorted(set(arguments.deletions)),
        overrides={name: value for name, value in budget.items() if value is not None},
    )
    with study_progress() as progress:
        busy = run_study(study, progress)
    for name in busy:
        warn(f"{name} was left to another process: run the command again when it has finished")


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
