"""The metrics of MUSE and TOFU as the open-unlearning benchmark computes them, as an oracle.

Written from the formulas, apart from the library: one row at a time, no padding, no cache. It keeps
what that benchmark does on purpose or by accident: texts cut from the right, an answer whose first
token may merge with the space of `"Answer: "`, the last labelled token left out of some metrics, the
floor of extraction strength, the 1e-10 in divisors. It needs a padding token that is not the end token.
"""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

IGNORED = -100
TINY = 1e-10
KNOWMEM_STOPS = ("\n\n", "\nQuestion", "Question:")
Row = dict[str, Any]
Pair = tuple[str, str]


class Encoded(NamedTuple):
    """A row: all ids, the ids that generation starts from, and labels as long as `ids`."""

    ids: list[int]
    prompt: list[int]
    labels: list[int]

    @property
    def labelled(self) -> list[int]:
        return [i for i in range(len(self.labels)) if self.labels[i] != IGNORED]

    @property
    def target(self) -> list[int]:
        return [self.ids[i] for i in self.labelled]


class Scores(NamedTuple):
    """Metric to value in [0, 1] (privleak: percent), and metric (and split) to value per row."""

    values: dict[str, float]
    rows: dict[str, list[float]]


# ---------------------------------------------------------------------------- encoding


def end_and_label(tokenizer: Any, ids: list[int], prompt: list[int]) -> Encoded:
    """Labels are what follows as many ids as the prompt has alone."""
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return Encoded(ids, prompt, [IGNORED] * len(prompt) + ids[len(prompt) :])


def encode_tags(
    tokenizer: Any,
    question: str,
    answer: str,
    few_shot: Sequence[Pair] = (),
    max_length: int = 512,
) -> Encoded:
    """`Question: `, newline, `Answer: `, and an empty line after every solved example."""
    prompt = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in few_shot)
    prompt += f"Question: {question}\nAnswer: "
    ids = tokenizer(prompt + answer, add_special_tokens=True)["input_ids"][:max_length]
    prompt_ids = tokenizer(prompt, add_special_tokens=True)["input_ids"][:max_length]
    return end_and_label(tokenizer, ids, prompt_ids)


def encode_chat(
    tokenizer: Any,
    question: str,
    answer: str,
    few_shot: Sequence[Pair] = (),
    system: str | None = None,
    **options: Any,
) -> Encoded:
    """Never cut. `options` go to the chat template (some ask for a `date_string`)."""
    messages = [{"role": "system", "content": system}] if system else []
    for q, a in [*few_shot, (question, answer)]:
        messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]

    def ids(part: list[dict[str, str]], opened: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            part, tokenize=False, add_generation_prompt=opened, **options
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return end_and_label(tokenizer, ids(messages, False), ids(messages[:-1], True))


def encode_completion(
    tokenizer: Any, prefix: str, text: str, insert_space: bool = False, max_length: int = 2048
) -> Encoded:
    """No end token. At least the first id, which nothing predicts, is not labelled."""
    joined = prefix + (" " if insert_space else "") + text
    prompt = tokenizer(prefix, add_special_tokens=True)["input_ids"]
    ids = tokenizer(joined, add_special_tokens=True)["input_ids"][: len(prompt) + max_length]
    ignored = max(len(prompt), 1)
    return Encoded(ids, prompt, ([IGNORED] * ignored + ids[ignored:])[: len(ids)])


def encode_text(tokenizer: Any, text: str) -> Encoded:
    """A text for membership inference: a completion of nothing."""
    return encode_completion(tokenizer, "", text)


# ---------------------------------------------------------------------------- one row


def distributions(model: Any, row: Encoded) -> torch.Tensor:
    """log p over the vocabulary at every labelled token, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([row.ids], device=model.device)).logits[0]
    before = [i - 1 for i in row.labelled]
    return torch.log_softmax(logits[before].double(), dim=-1)


def token_log_probabilities(model: Any, row: Encoded) -> list[float]:
    if not row.target:
        return []
    table = distributions(model, row)
    return [float(table[t, token]) for t, token in enumerate(row.target)]


def mia_loss(model: Any, row: Encoded) -> float:
    """Mean -log p of the labelled tokens, the end token included."""
    logs = token_log_probabilities(model, row)
    return -sum(logs) / len(logs) if logs else math.nan


def probability(model: Any, row: Encoded) -> float:
    return math.exp(-mia_loss(model, row))


def probability_w_options(model: Any, right: Encoded, wrong: Sequence[Encoded]) -> float:
    """c / (c + sum of w + 1e-10) of normalised probabilities."""
    c = probability(model, right)
    return c / (c + sum(probability(model, w) for w in wrong) + TINY)


def truth_ratio(model: Any, right: Sequence[Encoded], wrong: Sequence[Encoded]) -> float:
    """exp(-L_w) / (exp(-L_c) + 1e-10), L the mean loss over the answers of a kind."""
    loss_right = sum(mia_loss(model, r) for r in right) / len(right)
    loss_wrong = sum(mia_loss(model, w) for w in wrong) / len(wrong)
    return math.exp(-loss_wrong) / (math.exp(-loss_right) + TINY)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def generate(
    model: Any, tokenizer: Any, row: Encoded, new_tokens: int, stops: Sequence[str] = ()
) -> str:
    """Greedy continuation of the prompt, cut at the end token's text and at every stop, stripped."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([row.prompt], device=model.device),
            attention_mask=torch.ones(1, len(row.prompt), dtype=torch.long, device=model.device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
    text = decode(tokenizer, output[0, len(row.prompt) :].tolist())
    for stop in (tokenizer.decode([tokenizer.eos_token_id]), *stops):
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def ground_truth(tokenizer: Any, row: Encoded) -> str:
    return decode(tokenizer, row.target).replace(decode(tokenizer, row.prompt), "").strip()


def rouge(
    model: Any, tokenizer: Any, row: Encoded, new_tokens: int, stops: Sequence[str] = ()
) -> tuple[float, float]:
    """ROUGE-L F1 and recall, with stemming."""
    output = generate(model, tokenizer, row, new_tokens, stops)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    score = scorer.score(ground_truth(tokenizer, row), output)["rougeL"]
    return float(score.fmeasure), float(score.recall)


def hits(model: Any, row: Encoded) -> list[bool]:
    """Whether each labelled token but the last is the most likely one."""
    if len(row.target) < 2:
        return []
    best = distributions(model, row).argmax(dim=-1).tolist()
    return [best[t] == row.target[t] for t in range(len(row.target) - 1)]


def exact_memorization(model: Any, row: Encoded) -> float:
    found = hits(model, row)
    return sum(found) / len(found) if found else math.nan


def extraction_strength(model: Any, row: Encoded) -> float:
    """1 - k/m, k the smallest offset from which all is hit, else m - 1: the floor is 1/m."""
    found = hits(model, row)
    for k in range(len(found)):
        if all(found[k:]) or k == len(found) - 1:
            return 1 - k / len(found)
    return math.nan


def mia_zlib(model: Any, tokenizer: Any, row: Encoded) -> float:
    text = tokenizer.decode(row.target, skip_special_tokens=True)
    return mia_loss(model, row) / len(zlib.compress(text.encode("utf-8")))


def minus_mean_of_lowest(values: Sequence[float], share: float) -> float:
    if not values:
        return math.nan
    lowest = sorted(values)[: max(1, int(len(values) * share))]
    return -sum(lowest) / len(lowest)


def mia_min_k(model: Any, row: Encoded, share: float = 0.4) -> float:
    return minus_mean_of_lowest(token_log_probabilities(model, row)[:-1], share)


def mia_min_k_plus_plus(model: Any, row: Encoded, share: float = 0.4) -> float:
    """The same of (log p - mean) / sqrt(max(variance, 1e-6)) under the model's own distribution."""
    if len(row.target) < 2:
        return math.nan
    standardised = []
    for token, logs in zip(row.target[:-1], distributions(model, row), strict=False):
        mean_log = float((logs.exp() * logs).sum())
        variance = float((logs.exp() * logs**2).sum()) - mean_log**2
        standardised.append((float(logs[token]) - mean_log) / math.sqrt(max(variance, 1e-6)))
    return minus_mean_of_lowest(standardised, share)


def mia_gradnorm(model: Any, row: Encoded) -> float:
    """Mean over parameter tensors of the 2-norm of the gradient of the mean -log p, last labelled
    token left out, with the model in training mode."""
    positions = row.labelled[:-1]
    if not positions:
        return math.nan
    training = model.training
    model.train()
    model.zero_grad(set_to_none=True)
    logs = torch.log_softmax(model(torch.tensor([row.ids], device=model.device)).logits[0], dim=-1)
    torch.stack([-logs[i - 1, row.ids[i]] for i in positions]).mean().backward()
    norms = [float(p.grad.norm(p=2)) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    model.train(training)
    return sum(norms) / len(norms)


def mia_reference(model: Any, reference: Any, row: Encoded) -> float:
    return mia_loss(model, row) - mia_loss(reference, row)


# ---------------------------------------------------------------------------- over rows


def finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def mean(values: Sequence[float]) -> float:
    kept = finite(values)
    return sum(kept) / len(kept) if kept else math.nan


def closer_to_1_better(ratios: Sequence[float]) -> float:
    return mean([min(r, 1 / (r + TINY)) for r in ratios])


def true_better(ratios: Sequence[float]) -> float:
    return mean([max(0.0, 1 - r) if math.isfinite(r) else r for r in ratios])


def ks_test(ratios: Sequence[float], ratios_retrained: Sequence[float]) -> float:
    """Two-sided p-value: forget quality."""
    return float(ks_2samp(finite(ratios), finite(ratios_retrained)).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def hm_aggregate(values: Sequence[float]) -> float:
    """Harmonic mean: model utility; 0 where any value is 0."""
    return float(hmean(values))


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Scores are higher for strangers, so that 1 says: the forget texts are all better known."""
    kept_forget, kept_holdout = finite(forget), finite(holdout)
    if not kept_forget or not kept_holdout:
        return math.nan
    labels = [0] * len(kept_forget) + [1] * len(kept_holdout)
    return float(roc_auc_score(labels, kept_forget + kept_holdout))


def privleak(auc_model: float, auc_reference: float = 0.5) -> float:
    """In percent, of AUCs of min-k; the benchmark takes 0.5 where nothing was retrained."""
    reference = 1 - auc_reference
    return ((1 - auc_model) - reference) / (reference + TINY) * 100


# ---------------------------------------------------------------------------- folders


def read_rows(path: Path) -> list[Any]:
    """A JSON array, or JSON lines."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_texts(path: Path) -> list[str]:
    return [row if isinstance(row, str) else row["text"] for row in read_rows(path)]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def attacks(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Encoded],
    holdout: Sequence[Encoded],
    retrain: Any = None,
) -> Scores:
    """All membership attacks and privleak."""
    table: dict[str, Callable[[Encoded], float]] = {
        "mia_loss": lambda row: mia_loss(model, row),
        "mia_zlib": lambda row: mia_zlib(model, tokenizer, row),
        "mia_min_k": lambda row: mia_min_k(model, row),
        "mia_min_k_plus_plus": lambda row: mia_min_k_plus_plus(model, row),
        "mia_gradnorm": lambda row: mia_gradnorm(model, row),
    }
    if retrain is not None:
        table["mia_reference"] = lambda row: mia_reference(model, retrain, row)
    values: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    for name, score in table.items():
        for split, encoded in (("forget", forget), ("holdout", holdout)):
            rows[f"{name}/{split}"] = [score(row) for row in encoded]
        values[name] = auc(rows[f"{name}/forget"], rows[f"{name}/holdout"])
    values["privleak"] = privleak(values["mia_min_k"])
    if retrain is not None:
        reference = [[mia_min_k(retrain, row) for row in encoded] for encoded in (forget, holdout)]
        values["privleak"] = privleak(values["mia_min_k"], auc(*reference))
    return Scores(values, rows)


def with_means(rows: dict[str, list[float]]) -> Scores:
    return Scores({name: mean(of_rows) for name, of_rows in rows.items()}, rows)


def muse(model: Any, tokenizer: Any, folder: Path, retrain: Any = None) -> Scores:
    """Every metric of a MUSE folder, with the tag template."""
    rows: dict[str, list[float]] = {}
    verbatim = [
        encode_completion(tokenizer, row["prompt"], row["gt"], insert_space=True)
        for row in read_rows(folder / "verbmem" / "forget.json")
    ]
    rows["forget_verbmem"] = [rouge(model, tokenizer, row, 128)[0] for row in verbatim]
    for split in ("forget", "retain"):
        solved = read_rows(folder / "knowmem" / f"{split}_qa_icl.json")
        few_shot = [(row["question"], row["answer"]) for row in solved]
        encoded = [
            encode_tags(tokenizer, row["question"], row["answer"], few_shot)
            for row in read_rows(folder / "knowmem" / f"{split}_qa.json")
        ]
        rows[f"{split}_knowmem"] = [
            rouge(model, tokenizer, row, 32, KNOWMEM_STOPS)[0] for row in encoded
        ]
    rows["exact_memorization"] = [exact_memorization(model, row) for row in verbatim]
    rows["extraction_strength"] = [extraction_strength(model, row) for row in verbatim]
    texts = {
        split: [
            encode_text(tokenizer, text)
            for text in read_texts(folder / "privleak" / f"{split}.json")
        ]
        for split in ("forget", "holdout")
    }
    found = attacks(model, tokenizer, texts["forget"], texts["holdout"], retrain)
    return merge(with_means(rows), found)


Encode = Callable[[str, str], Encoded]


def right_answers(row: Row, split: str) -> list[str]:
    """What the truth ratio holds for right: a paraphrase where the model was trained on the answer."""
    return as_list(row["paraphrased_answer" if split in ("forget", "retain") else "answer"])


def tofu_ratios(model: Any, encode: Encode, rows: Sequence[Row], split: str) -> list[float]:
    return [
        truth_ratio(
            model,
            [encode(row["question"], answer) for answer in right_answers(row, split)],
            [encode(row["question"], answer) for answer in as_list(row["perturbed_answer"])],
        )
        for row in rows
    ]


def tofu_probabilities(model: Any, encode: Encode, rows: Sequence[Row], split: str) -> list[float]:
    """Of the answer; for real authors and world facts, as a share of all options."""
    values = []
    for row in rows:
        right = encode(row["question"], row["answer"])
        if split in ("forget", "retain"):
            values.append(probability(model, right))
        else:
            wrong = [encode(row["question"], option) for option in as_list(row["perturbed_answer"])]
            values.append(probability_w_options(model, right, wrong))
    return values


def tofu_split(
    model: Any, tokenizer: Any, encode: Encode, rows: Sequence[Row], split: str
) -> Scores:
    encoded = [encode(row["question"], row["answer"]) for row in rows]
    ratios = tofu_ratios(model, encode, rows, split)
    scores = with_means(
        {
            f"{split}_probability": tofu_probabilities(model, encode, rows, split),
            f"{split}_rouge": [rouge(model, tokenizer, row, 200)[1] for row in encoded],
            f"{split}_truth_ratio": ratios,
        }
    )
    aggregate = closer_to_1_better if split == "forget" else true_better
    scores.values[f"{split}_truth_ratio"] = aggregate(ratios)
    return scores


def tofu(
    model: Any,
    tokenizer: Any,
    folder: Path,
    forget_split: str = "forget10",
    retrain: Any = None,
    chat: bool = False,
) -> Scores:
    """Every metric of a TOFU folder; `chat` takes the tokenizer's chat template, else tags."""

    def encode(question: str, answer: str) -> Encoded:
        return (encode_chat if chat else encode_tags)(tokenizer, question, answer)

    names = {"forget": forget_split} | {n: n for n in ("retain", "real_authors", "world_facts")}
    data = {split: read_rows(folder / f"{name}_perturbed.json") for split, name in names.items()}
    scores = Scores({}, {})
    for split, rows in data.items():
        scores = merge(scores, tofu_split(model, tokenizer, encode, rows, split))
    scores.values["model_utility"] = hm_aggregate(
        [
            scores.values[f"{split}_{kind}"]
            for split in ("retain", "real_authors", "world_facts")
            for kind in ("probability", "rouge", "truth_ratio")
        ]
    )
    if retrain is not None:
        reference = tofu_ratios(retrain, encode, data["forget"], "forget")
        scores.values["forget_quality"] = ks_test(scores.rows["forget_truth_ratio"], reference)
    answers = [encode(row["question"], row["answer"]) for row in data["forget"]]
    memorised = {
        "exact_memorization": [exact_memorization(model, row) for row in answers],
        "extraction_strength": [extraction_strength(model, row) for row in answers],
    }
    return merge(
        scores,
        with_means(memorised),
        tofu_attacks(model, tokenizer, folder, names, encode, retrain),
    )


def tofu_attacks(
    model: Any,
    tokenizer: Any,
    folder: Path,
    names: dict[str, str],
    encode: Encode,
    retrain: Any,
) -> Scores:
    """Attacks on answers, where the folder holds `holdout<percent>.json`."""
    splits = (names["forget"], names["forget"].replace("forget", "holdout"))
    if not (folder / f"{splits[1]}.json").exists():
        return Scores({}, {})
    forget, holdout = (
        [encode(row["question"], row["answer"]) for row in read_rows(folder / f"{split}.json")]
        for split in splits
    )
    return attacks(model, tokenizer, forget, holdout, retrain)


def merge(*parts: Scores) -> Scores:
    values: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    for part in parts:
        values |= part.values
        rows |= part.rows
    return Scores(values, rows)
