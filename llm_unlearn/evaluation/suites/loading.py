"""A suite by its name, or from a folder in a benchmark's own layout."""

from collections.abc import Collection
from pathlib import Path

from llm_unlearn.evaluation.suites import muse, tofu
from llm_unlearn.evaluation.suites.demonstration import NAME, demonstration_muse
from llm_unlearn.evaluation.suites.reading import SUFFIXES
from llm_unlearn.evaluation.suites.suite import Suite


def load_suite(name: str, forget_split: str = "forget10", forgotten: Collection[str] = ()) -> Suite:
    """`demo` (MUSE on the toy world), `muse-news`, `muse-books`, `tofu`, or a folder of either layout.

    Args:
        forget_split: TOFU: which authors are to be forgotten.
        forgotten: `demo`: names of those.

    Raises:
        UserError: no such suite, or data that is missing or damaged.
    """
    folder = Path(name)
    if name == NAME and not folder.is_dir():
        return demonstration_muse(forgotten)
    files = [folder / f"{forget_split}_perturbed{suffix}" for suffix in SUFFIXES]
    if name in tofu.HUB or any(path.exists() for path in files):
        return tofu.load_tofu(name, forget_split)
    return muse.load_muse(name)
