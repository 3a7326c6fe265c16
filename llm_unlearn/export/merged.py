"""One model out of the base model and an adapter, as `from_pretrained` and llama.cpp's converter read it."""

import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from llm_unlearn.digests import tokenizer_digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact.base_model import load_base_of
from llm_unlearn.exact.store import RunDirectory

# What a tokenizer is loaded from, in any family. The base model's own files are taken as they are, since
# converters know tokenizers by them.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def write_merged(run: RunDirectory, adapter: Path, directory: Path) -> str:
    """Merge an adapter into the run's base model and write the result beside what is in `directory`.

    The sum is made in float32 and rounded once, to the type that each parameter had.

    Returns:
        Name of the type that most of it has.

    Raises:
        UserError: the base model cannot be loaded, or is not the run's.
        RunError: the adapter holds values that are no numbers, or the tokenizer does not come out the same.
    """
    model, tokenizer = load_base_of(run)
    model_type = model.dtype
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    adapted = PeftModel.from_pretrained(model.float(), str(adapter))
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RunError(
            f"the adapter cannot be merged ({error}): run `llm-unlearn verify`"
        ) from None
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(types[name])
    merged.config.dtype = model_type
    merged.save_pretrained(directory)
    _write_tokenizer(run, tokenizer, directory)
    return str(model_type).removeprefix("torch.")


def _write_tokenizer(
    run: RunDirectory, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    tokenizer.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        original = cached_file(
            run.shape.name_or_path,
            name,
            revision=run.shape.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if original is not None:
            shutil.copyfile(original, directory / name)
    if tokenizer_digest(AutoTokenizer.from_pretrained(directory)) != tokenizer_digest(tokenizer):
        raise RunError(
            f"the tokenizer of {run.shape.name_or_path} does not come out of an export as it went in: "
            "its files contradict each other"
        )
