"""Score a model with MUSE's criteria: verbatim and knowledge memorization, privacy, utility.

    python eval/muse.py
        The demonstration's run, asked about whom it has deleted. No network.

    python eval/muse.py --model UNLEARNED --retrain RETRAINED --before TARGET --suite muse-news \\
        --output_dir evaluations/news
        A model that has unlearned, beside the one that never saw the data and the one that did.

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
        suites="demo, muse-news or muse-books (from the Hub), or a folder in the benchmark's layout",
        profiles="default; muse: as the released code; open-unlearning: as that benchmark",
    )
    arguments = parser.parse_args(argv)

    def load(forgotten: Sequence[str]):
        from llm_unlearn.evaluation.suites.demonstration import NAME, demonstration_muse
        from llm_unlearn.evaluation.suites.muse import load_muse

        is_demonstration = arguments.suite == NAME and not Path(NAME).is_dir()
        return demonstration_muse(forgotten) if is_demonstration else load_muse(arguments.suite)

    scoring.run(arguments, load)


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
