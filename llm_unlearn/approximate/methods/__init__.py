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
    "wga": "wga:WGA",
    "satimp": "satimp:SatImp",
    "neggrad_plus": "neggrad_plus:NegGradPlus",
    "scrub": "scrub:SCRUB",
    "undial": "undial:UNDIAL",
    "ceu": "ceu:CEU",
    "pdu": "pdu:PDU",
    "rmu": "rmu:RMU",
    "eul": "eul:EUL",
    "replacement": "replacement:Replacement",
    "balanced_subnet": "balanced_subnet:BalancedSubnet",
    "ssd": "ssd:SSD",
    "idk_dpo": "idk_dpo:IdkDPO",
    "altpo": "altpo:AltPO",
    "idk_ap": "idk_ap:IdkAP",
    "refusal": "refusal:RefusalTuning",
    "random_label": "random_label:RandomLabel",
    "me": "maximum_entropy:MaximumEntropy",
    "retain_ft": "retain_ft:RetainFineTuning",
    "scurenewton": "scurenewton:SCureNewton",
    "damped_newton": "damped_newton:DampedNewton",
    "task_vector": "task_vector:TaskVector",
    "whp": "whp:WhosHarryPotter",
    "icu": "icu:ICU",
    "o3": "o3:O3",
}


def load_method(name: str) -> "type[Method]":
    """The class of a method; its file does not import torch."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
