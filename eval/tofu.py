"""Score a model with TOFU's metrics: forget quality, model utility, and what they are made of.

    python eval/tofu.py
        The demonstration's run, asked about whom it has deleted. No network.

    python eval/tofu.py --model UNLEARNED --retrain RETRAINED --before FULL --suite tofu \\
        --forget_split forget10 --output_dir evaluations/tofu
        A model that has unlearned, beside the one that never saw the authors and the one that did.

Prints one table, and writes results.json and report.html to --output_dir. Texts that a model says are
personal: they are left out of both unless --show_text.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llm_unlearn import scoring
from llm_unlearn.console import run_and_exit


def main(argv: list[str]) -> None:
    assert __doc__
    parser = scoring.make_parser(
        __doc__,
        suites="demo, tofu (from the Hub), or a folder with the benchmark's files",
        profiles="default; open-unlearning: as that benchmark",
    )
    parser.add_argument("--forget_split", default="forget10", help="forget01, forget05 or forget10")
    arguments = parser.parse_args(argv)

    def load(forgotten: Sequence[str]):
        from llm_unlearn.evaluation.suites.demonstration import NAME, demonstration_tofu
        from llm_unlearn.evaluation.suites.tofu import load_tofu

        if arguments.suite == NAME and not Path(NAME).is_dir():
            return demonstration_tofu(forgotten)
        return load_tofu(arguments.suite, arguments.forget_split)

    scoring.run(arguments, load)


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
