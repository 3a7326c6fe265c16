"""Attack a model that has unlearned: what comes back, beside what comes out of a retrained one.

    python eval/attacks.py --model UNLEARNED --retrain RETRAINED --before TARGET --suite demo
        relearning         a few steps of fine-tuning on part of the forgotten rows
        sampling           the best of k sampled answers (leak@k)
        quantization       8 and 4 bit, and how many weights fall back on their old code
        prompting          after examples, in other words, without the name: the worst case
        extraction         the old model guided by its difference to the new one
        over-unlearning    whether neighbours of the forgotten rows lose more than others

Prints one table, and writes results.json and report.html to --output_dir.
"""

import sys

from llm_unlearn import attacking, scoring
from llm_unlearn.console import run_and_exit


def main(argv: list[str]) -> None:
    assert __doc__
    parser = scoring.make_parser(
        __doc__,
        suites="demo, muse-news, muse-books, tofu, or a folder in MUSE's layout or TOFU's",
        profiles="default, muse or open-unlearning",
    )
    attacking.add_flags(parser)
    attacking.run(parser.parse_args(argv))


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
