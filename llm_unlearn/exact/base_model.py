"""Loading the base model and its tokenizer, from the Hub, a directory or the embedded demonstration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_unlearn.digests import tensors_digest
from llm_unlearn.errors import UserError
from llm_unlearn.exact.store import RunDirectory


def load_base(
    name_or_path: str, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in evaluation mode, and its tokenizer.

    Weights come as safetensors only: a pickle could run anything.

    Args:
        options: `dtype` (a torch type's name; float32 by default) and `attn_implementation`.

    Raises:
        UserError: it cannot be found or loaded.
    """
    options = options or {}
    dtype = options.get("dtype") or "float32"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(
            f"--dtype {dtype!r} is not a torch type: expected float32, bfloat16, float16 or auto"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=options.get("attn_implementation"),
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "directory" if Path(name_or_path).is_dir() else "model"
        raise UserError(f"cannot load the {where} {name_or_path!r}: {reason}") from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), tokenizer


def load_base_of(run: RunDirectory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that a run was made from.

    Raises:
        UserError: it cannot be loaded, or its weights are not those that the run remembers.
    """
    model, tokenizer = load_base(run.shape.name_or_path, run.shape.revision, run.config.model)
    if tensors_digest(model) != run.shape.weights:
        raise UserError(
            f"{run.shape.name_or_path} does not hold the weights that {run.path} was made from: "
            "restore that version of the base model"
        )
    return model, tokenizer
