"""Any model that can be asked: a base model, a PEFT adapter, a run, or the shards that a run serves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, and what to call it.

    Attributes:
        run: the run directory that it is served from, if any.
    """

    model: Any
    tokenizer: Any
    label: str
    run: Path | None = None


def load_model(
    name_or_path: str,
    adapter: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load what a person points at, on the GPU where there is one. Safetensors only.

    Args:
        name_or_path: a model on the Hub or in a directory, a PEFT adapter's directory, a run, or the
            `served` directory of one.
        adapter: a PEFT adapter to put on the model.
        dtype: a torch type's name; float32 by default.

    Raises:
        UserError: it cannot be found or loaded.
    """
    path = Path(name_or_path)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if adapter is not None:
        base, tokenizer = _base(name_or_path, revision, options)
        label = f"{name_or_path} + {adapter}"
        model = wrapped(with_adapter(base, adapter), tokenizer, Path(adapter))
        return LoadedModel(model, tokenizer, label)
    if run := run_of(path):
        return _load_run(run, name_or_path, dtype)
    if (path / "adapter_config.json").is_file():
        base, tokenizer = _base(base_of_adapter(path), None, options)
        model = wrapped(with_adapter(base, name_or_path), tokenizer, path)
        return LoadedModel(model, tokenizer, name_or_path)
    base, tokenizer = _base(name_or_path, revision, options)
    return LoadedModel(wrapped(base, tokenizer, path), tokenizer, name_or_path)


def run_of(path: Path) -> Path | None:
    """The run that a path is, or whose `served` directory it is."""
    for candidate in (path, path.parent):
        if (candidate / "run.json").is_file() and (candidate == path or path.name == "served"):
            return candidate
    return None


def base_of_adapter(path: Path) -> str:
    """The base model that an adapter names.

    Raises:
        UserError: it names none.
    """
    try:
        name = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        name = None
    if not name:
        raise UserError(f"{path} does not name its base model: give --model BASE --adapter {path}")
    return str(name)


def subjects_in(run: Path) -> set[str]:
    """Subjects whose records a run still holds, in its permanent core too."""
    from llm_unlearn.data.partition import CORE
    from llm_unlearn.exact.run import S3TRun

    directory = S3TRun.open(run).directory
    names = [*directory.slices.names, *([CORE] if directory.core else [])]
    return {record.subject for name in names for record in directory.slices.read(name)}


def _load_run(run: Path, label: str, dtype: str | None) -> LoadedModel:
    from llm_unlearn.exact.base_model import load_base_of
    from llm_unlearn.exact.ensemble import ShardEnsemble
    from llm_unlearn.exact.run import S3TRun

    directory = S3TRun.open(run).directory
    base, tokenizer = load_base_of(directory)
    ensemble = ShardEnsemble.from_run(
        _placed(base, dtype), directory.served, directory.config.rule, tokenizer
    )
    return LoadedModel(ensemble, tokenizer, label, run)


def _base(name: str, revision: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    from llm_unlearn.exact.base_model import load_base

    model, tokenizer = load_base(name, revision, options)
    return _placed(model, None), tokenizer


def _placed(model: Any, dtype: str | None) -> Any:
    import torch
    from accelerate import PartialState

    model = model.to(PartialState().device)
    return model.to(getattr(torch, dtype)) if dtype else model


def wrapped(model: Any, tokenizer: Any, path: Path) -> Any:
    """What an approximate method left to answer through, if it left more than weights."""
    if not (path / "wrapper.json").is_file():
        return model
    from llm_unlearn.approximate.methods import load_method

    settings = json.loads((path / "wrapper.json").read_bytes())
    return load_method(settings["method"]).wrap(model, tokenizer, path, settings)


def with_adapter(base: Any, adapter: str, trainable: bool = False) -> Any:
    """A PEFT adapter on a model, in evaluation mode.

    Args:
        trainable: give gradients to its parameters.

    Raises:
        UserError: it does not fit.
    """
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(
            base, adapter, is_trainable=trainable, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "size mismatch" in str(error):
            reason = "the shapes do not fit, it was made for another model"
        raise UserError(f"cannot put the adapter {adapter!r} on the model: {reason}") from None
    return model.eval()
