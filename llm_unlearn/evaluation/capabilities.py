"""Standard capabilities (WMDP, MMLU and every other task of lm-evaluation-harness), as an extra.

Names are lm-eval's own: `wmdp_bio`, `wmdp_chem`, `wmdp_cyber` (arXiv 2403.03218: hazardous knowledge, to
be lower after unlearning, at best the 0.25 of guessing), `mmlu` and its parts (utility, to stay high),
or those of local YAML files below `include_path`, which need no Hub.
"""

import copy
import importlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.results import NAN, Value

NORMAL_95 = 1.959963984540054
BOOTSTRAP_SAMPLES = 1000  # only for metrics whose standard error has no closed form
SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match")  # means of values in [0, 1]


def evaluate_capabilities(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 16,
    apply_chat_template: bool = False,
) -> dict[str, Value]:
    """Score a causal model, an adapter or an ensemble on tasks of lm-evaluation-harness.

    The interval is the mean plus or minus 1.96 of lm-eval's standard errors, inside [0, 1] for shares. Where
    all rows or none are right, so that this error is 0, it is the exact one of Clopper and Pearson.
    lm-eval seeds the global random generators of `random`, numpy and torch.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: folder of further task files; looked at before lm-eval's own.
        num_fewshot: solved examples before each question; None is the task's own number, and lm-eval
            keeps it where a task asks for 0.
        limit: rows of each task, from the first; None is all of them.
        batch_size: a number, or `auto`.

    Returns:
        `task/metric` to value (a filter other than `none` follows in brackets); direction and range are
        the metric's: accuracy is in [0, 1]. A group has an entry where lm-eval aggregates it.

    Raises:
        UserError: lm-eval is not installed, a task is unknown or twice there, or its data is out of reach.
    """
    harness, task_names = _import_harness(), list(tasks)
    if not task_names:
        raise UserError("no task to evaluate: name at least one, such as wmdp_cyber or mmlu")
    was_training = model.training
    with _quiet():
        loaded = _load_tasks(harness, task_names, include_path)
        language_model = harness["models.huggingface"].HFLM(
            pretrained=model,
            # lm-eval sets the padding of the tokenizer that it is given.
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
        )
        results = harness["evaluator"].simple_evaluate(
            model=language_model,
            tasks=loaded,
            task_manager=harness["tasks"].TaskManager(include_defaults=False),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    model.train(was_training)
    return _values(results or {"results": {}})


def _import_harness() -> dict[str, Any]:
    try:
        return {
            name: importlib.import_module(f"lm_eval.{name}")
            for name in ("evaluator", "models.huggingface", "tasks")
        }
    except ImportError as error:
        raise UserError(
            f"standard tasks need lm-evaluation-harness ({error}): pip install 'llm-unlearn[lm-eval]'"
        ) from None


def _load_tasks(harness: Mapping[str, Any], names: list[str], folder: Path | None) -> list[Any]:
    """Tasks and groups, each asked for by name once, so that a failure can be told by name."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--include_path {folder} is not a folder of task files")
    manager = _task_manager(harness, names, folder)
    loaded: list[Any] = []
    seen: dict[str, str] = {}
    for name in names:
        found = _load_task(manager, name, folder)
        for part in found["tasks"]:
            if part in seen:
                raise UserError(f"task {part} is asked for twice, by {seen[part]} and by {name}")
            seen[part] = name
        group = found["groups"].get(name)
        loaded += list(found["tasks"].values()) if group is None else [group]
    return loaded


def _task_manager(harness: Mapping[str, Any], names: list[str], folder: Path | None) -> Any:
    """Reading the index of lm-eval's own tasks takes seconds: only if a name is not in `folder`."""
    manager = harness["tasks"].TaskManager
    if folder is not None:
        local = manager(include_path=str(folder), include_defaults=False)
        if all(name in local.all_tasks for name in names):
            return local
    return manager(include_path=None if folder is None else str(folder))


def _load_task(manager: Any, name: str, folder: Path | None) -> Any:
    from datasets.exceptions import DatasetsError

    if name not in manager.all_tasks:
        place = "lm-eval" if folder is None else f"lm-eval or {folder}"
        raise UserError(
            f"{place} has no task {name!r}: `lm_eval ls tasks` lists them; --include_path FOLDER adds "
            "your own task files"
        )
    try:
        return manager.load([name])
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load task {name!r} ({reason}): it needs the Hub or its cache; offline, describe it "
            "by a task file with local data_files and give the folder by --include_path"
        ) from None


def _values(results: Mapping[str, Any]) -> dict[str, Value]:
    found = {}
    for task, entries in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        n = int(entries.get("sample_len", counts.get("effective", 0)))
        of_all = counts.get("original", n)
        note = "" if n == of_all else f"the first {n} of {of_all} rows"
        for key, value in entries.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" if chain == "none" else f"{task}/{metric} ({chain})"
            error = entries.get(f"{metric}_stderr,{chain}")
            found[name] = _value(metric, float(value), error, n, note)
    return found


def _value(metric: str, value: float, error: Any, n: int, note: str) -> Value:
    """A metric without a standard error (lm-eval says `N/A`) has no interval."""
    if not isinstance(error, int | float) or not math.isfinite(error):
        return Value(value, NAN, NAN, n, note=note)
    lower, upper = value - NORMAL_95 * error, value + NORMAL_95 * error
    if metric in SHARES:
        # What n equal outcomes leave open: a rarer outcome would have shown with 97.5 %.
        margin = 1 - 0.025 ** (1 / n) if error == 0 and n else 0.0
        lower, upper = max(lower - margin, 0.0), min(upper + margin, 1.0)
    return Value(value, lower, upper, n, note=note, detail={"standard_error": float(error)})


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every model that is passed as an object, and of every default."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
