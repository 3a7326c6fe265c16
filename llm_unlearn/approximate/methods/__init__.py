"""Every method by its name: adding one is a file and a line here."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_unlearn.approximate.method import Method

METHODS: dict[str, str] = {
    "ga": "gradient_ascent:GradientAscent",
    "graddiff": "gradient_difference:GradientDifference",
    "npo": "npo:NPO",
    "simnpo": "simnpo:SimNPO",
    "kl": "kl_minimization:KLMinimization",
    "icu": "icu:ICU",
    "o3": "o3:O3",
}


def load_method(name: str) -> "type[Method]":
    """The class of a method; its file does not import torch."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
