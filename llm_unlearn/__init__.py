"""Exact and approximate unlearning for Hugging Face models.

Names are imported when they are used, so that the command line starts quickly.
"""

import os
import warnings
from typing import TYPE_CHECKING

from llm_unlearn.lazy import importer

# A privacy tool does not tell anybody what it trains on.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# cuBLAS reads this once, when CUDA starts: without it equal runs on a GPU differ in their last bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PEFT still reads a property of Transformers under its old name; nothing that a user could mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

if TYPE_CHECKING:
    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.trainer import UnlearningTrainer
    from llm_unlearn.approximate.unlearn import unlearn
    from llm_unlearn.data.records import Record, make_records
    from llm_unlearn.errors import RunError, UserError
    from llm_unlearn.evaluation.harness import evaluate_suite
    from llm_unlearn.exact.arguments import S3TConfig
    from llm_unlearn.exact.ensemble import ShardEnsemble
    from llm_unlearn.exact.run import S3TRun

_HOMES = {
    "Record": "llm_unlearn.data.records",
    "RunError": "llm_unlearn.errors",
    "S3TConfig": "llm_unlearn.exact.arguments",
    "S3TRun": "llm_unlearn.exact.run",
    "ShardEnsemble": "llm_unlearn.exact.ensemble",
    "UnlearningConfig": "llm_unlearn.approximate.arguments",
    "UnlearningTrainer": "llm_unlearn.approximate.trainer",
    "UserError": "llm_unlearn.errors",
    "evaluate_suite": "llm_unlearn.evaluation.harness",
    "make_records": "llm_unlearn.data.records",
    "unlearn": "llm_unlearn.approximate.unlearn",
}

__all__ = [
    "Record",
    "RunError",
    "S3TConfig",
    "S3TRun",
    "ShardEnsemble",
    "UnlearningConfig",
    "UnlearningTrainer",
    "UserError",
    "evaluate_suite",
    "make_records",
    "unlearn",
]
__version__ = "0.1.0"


__getattr__ = importer(__name__, _HOMES)
