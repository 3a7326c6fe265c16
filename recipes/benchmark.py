"""All methods, exact unlearning and retraining on one suite: one leaderboard with intervals and cost.

    python recipes/benchmark.py
        the embedded demonstration: twelve of 48 invented people are forgotten by every method

    python recipes/benchmark.py --methods npo simnpo graddiff --seeds 3
    python recipes/benchmark.py --suite tofu-folder --base meta-llama/Llama-3.2-1B-Instruct \\
        --forget forget10.json --retain retain90.json --rows_per_subject 20 --methods npo rmu

    --methods [NAME ...]    of recipes/unlearn.py (all); no name: only the exact rows
    --exact [NAME ...]      experts, s3t (both); no name: only approximate rows
    --refine [SCORE]        rows of RUM by this memorization score (confidence), with its controls
    --seeds N               of everything that is trained (1): intervals over seeds instead of rows
    --suite NAME_OR_DIR     the demonstration asks as tofu (default) or muse
    --forget_split NAME     of tofu (forget10)
    --base M                own data: the model before any fine-tuning. It is fine-tuned on both sets
                            (the model before unlearning) and on --retain alone (the retrained one)
    --forget, --retain      files or Hub datasets NAME[:CONFIG[:SPLIT]]
    --subject_column C, --rows_per_subject N    own data: who can ask for deletion (exact rows)
    --settings FILE.yaml    training flags: fine_tuning, unlearning, unlearning_of, methods, exact
    --report_only           write the leaderboard again from what is measured
    --output_dir DIR        models, results and leaderboard (runs/benchmark)
    --json                  print the leaderboard for machines

Interrupted? Run the same command again: it goes on where it was.
"""

import argparse
import shlex
import sys
from pathlib import Path

from llm_unlearn.console import attack_progress, print_json, print_table, run_and_exit, warn
from llm_unlearn.errors import UserError
from llm_unlearn.launch import refuse, refuse_push, wants_short_help


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--exact", nargs="*")
    parser.add_argument("--refine", nargs="?", const="confidence")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--suite", default="tofu")
    parser.add_argument("--forget_split", default="forget10")
    parser.add_argument("--base")
    parser.add_argument("--forget")
    parser.add_argument("--retain")
    parser.add_argument("--subject_column")
    parser.add_argument("--rows_per_subject", type=int)
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    return parser.parse_args(argv)


def wanted_rows(arguments: argparse.Namespace) -> list[str]:
    """Rows of the leaderboard, exact ones first."""
    from llm_unlearn.approximate.methods import METHODS
    from llm_unlearn.leaderboard.plan import EXACT, REFINED
    from llm_unlearn.memorization.orientation import SCORES

    if arguments.refine not in (None, *SCORES):
        raise UserError(f"unknown --refine {arguments.refine!r}: one of {', '.join(SCORES)}")
    methods = list(METHODS) if arguments.methods is None else arguments.methods
    if unknown := set(methods) - set(METHODS):
        raise UserError(f"unknown method {min(unknown)!r}: one of {', '.join(METHODS)}")
    exact = {method: row for row, method in EXACT.items()}
    chosen = list(exact) if arguments.exact is None else arguments.exact
    if unknown := set(chosen) - set(exact):
        raise UserError(f"unknown --exact {min(unknown)!r}: {' or '.join(exact)}")
    refined = list(REFINED) if arguments.refine else []
    return [*(exact[name] for name in chosen), *methods, *refined]


def main(argv: list[str]) -> None:
    if wants_short_help(argv):
        print(__doc__)
        return
    refuse_push(argv)
    arguments = read_arguments(argv)
    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {arguments.seeds}")
    rows = wanted_rows(arguments)

    from llm_unlearn.leaderboard.page import print_leaderboard, write_leaderboard
    from llm_unlearn.leaderboard.plan import Benchmark
    from llm_unlearn.leaderboard.running import run
    from llm_unlearn.leaderboard.standings import read_leaderboard
    from llm_unlearn.leaderboard.worlds import make_world
    from llm_unlearn.scoring import processes, quiet

    quiet()
    if processes().num_processes > 1:
        raise UserError("the benchmark runs in one process: start it with python")
    benchmark = Benchmark(make_world(arguments), rows, arguments.seeds, arguments.output_dir)
    if not arguments.report_only:
        with attack_progress(log=True) as say:
            for failure in run(benchmark, say):
                warn(failure)
    board = read_leaderboard(benchmark)
    command = shlex.join(["python", "recipes/benchmark.py", *argv])
    paths = write_leaderboard(board, arguments.output_dir, command)
    if arguments.json:
        print_json(board.to_dict())
        return
    print_leaderboard(board, print_table)
    winners = ", ".join(board.winners()) or "nothing"
    print(f"passes everything: {winners}\nwritten: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
