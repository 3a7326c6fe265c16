"""Plots of an evaluation as SVG or PNG bytes; `None` where there is nothing to draw.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every series also
has its own marker, hatch or line style. Labels of models are shortened from the left and taken
literally: they are paths and hold no mathematics.
"""

import io
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm_unlearn.evaluation import tradeoff
from llm_unlearn.evaluation.catalogue import closeness, format_number
from llm_unlearn.evaluation.results import Columns, Evaluation, Results, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]
INK, FAINT, PAPER = "#22262b", "#d9dde2", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
SKY, VERMILION, GREY = "#56b4e9", "#d55e00", "#6b7280"
MOST_IN_LEGEND = 14  # models; with more, names stand at their points
ROLES = {"before": ORANGE, "model": BLUE, "retrained": GREY}
HATCHES = {"before": "///", "model": "", "retrained": "..."}
SERIES = (BLUE, VERMILION, GREEN, PURPLE, SKY)
MARKERS = "oD^vPX<>"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.facecolor": PAPER,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "llm-unlearn",  # the same results give the same bytes
}

# The questions that a reader has, in this order; the first six that can be answered are drawn.
# A p-value needs a log scale, on which a bar has no foot: `tradeoff_plot` shows it.
QUESTIONS = {
    "forget_verbmem": "Does it recite\nforgotten text?",
    "forget_knowmem": "Does it know\nforgotten facts?",
    "privleak": "Can membership\nbe told? (PrivLeak)",
    "retain_knowmem": "Does it know\nwhat it should keep?",
    "model_utility": "Is it still\nuseful?",
    "forget_probability": "How likely are\nforgotten answers?",
    "forget_rouge": "Does it recall\nforgotten answers?",
    "forget_truth_ratio": "Are right and wrong\nequally likely?",
    "retain_rouge": "Does it recall\nwhat it should keep?",
    "forget_knowmem_name_free": "Does it know them\nwithout the name?",
    "forget_rouge_name_free": "Does it know them\nwithout the name?",
    "substitution": "Does it give other\npeople's facts?",
    "mia_min_k": "Can membership\nbe told? (AUC)",
}
RADAR = {
    "forget_verbmem": "C1 no verbatim memorization",
    "forget_knowmem": "C2 no knowledge",
    "privleak": "C3 no privacy leak",
    "retain_knowmem": "C4 utility",
    "scalability": "C5 scalability",
    "sustainability": "C6 sustainability",
    "forget_probability": "forget probability",
    "forget_rouge": "forget ROUGE",
    "forget_truth_ratio": "forget truth ratio",
    "mia_min_k": "membership",
    "retain_rouge": "retain ROUGE",
    "model_utility": "utility",
}
CURVES = {"scalability": "C5 scalability", "sustainability": "C6 sustainability"}
ATTACKS = {
    "loss": "loss",
    "zlib": "zlib",
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
    "gradnorm": "gradient norm",
}
ATTACKED = (("privleak/forget", "privleak/holdout"), ("forget", "holdout"))


def shorten(label: str, length: int = 28) -> str:
    """The end of a path, where names differ; `…` stands for what was cut."""
    if len(label) <= length:
        return label
    parts = PurePath(label).parts
    for start in range(1, len(parts)):
        if len(tail := "…/" + "/".join(parts[start:])) <= length:
            return tail
    return "…" + label[1 - length :]


def shorten_all(labels: Sequence[str], length: int = 28) -> list[str]:
    """Shortened labels that stay as different as they were."""
    found = [shorten(label, length) for label in labels]
    while len(set(found)) < len(set(labels)):
        length += 8
        found = [shorten(label, length) for label in labels]
    return found


def metric_bars(results: Results, form: Format = "svg") -> bytes | None:
    """Main metrics of the model beside `before` and `retrained`, each with its 95 % interval."""
    shown = _present(results)
    names = [
        name
        for name in QUESTIONS
        if any(math.isfinite(_value(one, name).value) for one in shown.values())
    ][:6]
    if not names:
        return None
    with styled():
        columns = min(3, len(names))
        rows = math.ceil(len(names) / columns)
        figure = new_figure(3.1 * columns, 2.75 * rows + 0.4)
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for name, axes in zip(names, panels, strict=False):
            _draw_bars(axes, name, shown, results.profile)
        for axes in list(panels)[len(names) :]:
            axes.set_visible(False)
        handles = [_patch(role) for role in shown]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
        return to_bytes(figure, form)


def radar(results: Results, form: Format = "svg") -> bytes | None:
    """How close to retraining on each criterion; the outer ring is the retrained model itself."""
    retrained = results.others.get("retrained")
    if retrained is None:
        return None
    drawn = {role: one for role, one in _present(results).items() if role != "retrained"}
    scores = {role: _radar_scores(results, one, retrained) for role, one in drawn.items()}
    spokes = [title for title, score in scores["model"].items() if math.isfinite(score)][:6]
    if len(spokes) < 3:
        return None
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    with styled():
        figure = new_figure(7.4, 4.9)
        axes: Any = figure.add_subplot(projection="polar")
        _dress_radar(axes, angles, spokes)
        for role, score in scores.items():
            # C5 and C6 belong to a method: a reference has none, and its outline skips them.
            pairs = [(a, score[s]) for a, s in zip(angles, spokes, strict=True) if s in score]
            pairs = [pair for pair in pairs if math.isfinite(pair[1])]
            if not pairs:
                continue
            around, radii = zip(*pairs, strict=True)
            line = {"color": ROLES[role], "linestyle": "-" if role == "model" else "--"}
            if len(pairs) == len(spokes):  # closed only where nothing is missing
                axes.fill(around, radii, color=ROLES[role], alpha=0.12)
                around, radii = (*around, around[0]), (*radii, radii[0])
            axes.plot(
                around,
                radii,
                marker="o" if role == "model" else "s",
                linewidth=2,
                label=role,
                clip_on=False,
                zorder=4,
                **line,
            )
        axes.plot([], [], color=INK, linewidth=1.2, label="retrained")
        figure.legend(loc="outside right upper")
        return to_bytes(figure, form)


def roc_curves(results: Results, form: Format = "svg") -> bytes | None:
    """ROC of the membership attacks, linear and, for the few surest guesses, on log scales."""
    curves = attack_curves(results.model.records)
    if not curves:
        return None
    retrained = results.others.get("retrained")
    references = attack_curves(retrained.records) if retrained else {}
    with styled():
        figure = new_figure(9.4, 4.5)
        linear, logarithmic = figure.subplots(1, 2)
        lowest = 1.0
        for (name, (wrong, found)), color in zip(curves.items(), SERIES, strict=False):
            lowest = min(lowest, *(rate for rate in (*wrong, *found) if rate > 0))
            for axes in (linear, logarithmic):
                axes.step(wrong, found, where="post", color=color, label=ATTACKS[name])
                if name in references:
                    line = {"linestyle": ":", "linewidth": 1.2, "alpha": 0.8}
                    axes.step(*references[name], where="post", color=color, **line)
        for axes in (linear, logarithmic):
            axes.plot([lowest / 2, 1], [lowest / 2, 1], color=GREY, linewidth=1, linestyle="--")
            axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
        linear.set(title="Forgotten against holdout text", xlim=(-0.01, 1), ylim=(0, 1.01))
        linear.set_aspect("equal")
        linear.legend(loc="lower right", title="dotted: retrained" if references else None)
        # A curve starts at 0, which a log scale clips to the edge.
        for set_scale in (logarithmic.set_xscale, logarithmic.set_yscale):
            set_scale("log", nonpositive="clip")
        edge = lowest * 0.8
        logarithmic.set(title="The same at low rates", xlim=(edge, 1.05), ylim=(edge, 1.1))
        logarithmic.set_aspect("equal")
        return to_bytes(figure, form)


def tradeoff_plot(plane: tradeoff.Tradeoff, form: Format = "svg") -> bytes | None:
    """Forgetting against utility; a star is the retrained model, rings are the Pareto front."""
    if not plane.points:
        return None
    with styled():
        is_crowded = len(plane.points) > MOST_IN_LEGEND
        figure = new_figure(*((11.0, 7.0) if is_crowded else (8.2, 4.8)))
        axes = figure.subplots()
        models = 0
        names = shorten_all([point.label for point in plane.points])
        for point, name in zip(plane.points, names, strict=True):
            # The stars and rings are see-through where another point lies below them.
            axes.scatter(point.x, point.y, label=_literal(name), **_look(point, models))
            models += point.role not in ROLES or point.role == "model"
            if is_crowded:
                place = {"xytext": (5, 4), "textcoords": "offset points", "size": 7}
                axes.annotate(_literal(name), (point.x, point.y), **place)
        front = sorted((p for p in plane.points if p.on_front), key=lambda p: p.x)
        if len([p for p in plane.points if p.role == "model"]) > 1:
            _draw_front(axes, front)
        axes.set(xlabel=plane.x_title, ylabel=plane.y_title, title="Upper right is best")
        axes.margins(0.1)
        axes.set_ylim(bottom=0, top=max(0.05, *(1.15 * p.y for p in plane.points)))
        if plane.logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(min(p.x for p in plane.points) / 10, 10)
            axes.axvline(0.05, color=GREY, linestyle=":", linewidth=1.2)
            axes.annotate(
                " p = 0.05", (0.05, 0.02), xycoords=("data", "axes fraction"), color=GREY, size=8
            )
        else:
            axes.set_xlim(max(0.05, *(1.15 * p.x for p in plane.points)), 0)
            axes.set_xlim(right=-0.04 * axes.get_xlim()[0])
        if not is_crowded:
            figure.legend(loc="outside right upper", labelspacing=0.9)
        return to_bytes(figure, form)


def curves_plot(results: Results, form: Format = "svg") -> bytes | None:
    """Values by step: scalability, sustainability, attacks. `relearning: model` joins its group.

    What a step is comes from its note (`step 10`, `k = 4`) where every step has one.
    """
    groups: dict[str, dict[str, list[Value]]] = {}
    for name, values in results.curves.items():
        group, _, role = name.partition(": ")
        if any(math.isfinite(value.value) for value in values):
            groups.setdefault(group, {})[role or "model"] = values
    if not groups:
        return None
    with styled():
        columns = min(3, len(groups))
        rows = math.ceil(len(groups) / columns)
        figure = new_figure(3.9 * columns if columns > 1 else 5.2, 3.3 * rows)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for (group, curves), axes in zip(groups.items(), panels, strict=False):
            _draw_curves(axes, curves)
            axes.set_title(_literal(CURVES.get(group, group)))
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        return to_bytes(figure, form)


def _draw_curves(axes: "Axes", curves: dict[str, list[Value]]) -> None:
    others = iter(SERIES[1:] * len(curves))
    ends = [0.0]
    for number, (role, values) in enumerate(curves.items()):
        steps = np.arange(len(values))
        color = ROLES.get(role) or next(others)
        height, lower, upper = (
            [getattr(value, end) for value in values] for end in ("value", "lower", "upper")
        )
        ends += [end for end in (*height, *lower) if math.isfinite(end)]
        axes.fill_between(steps, lower, upper, color=color, alpha=0.15, linewidth=0)
        line = {"linewidth": 2, "linestyle": "-" if role == "model" else "--"}
        axes.plot(
            steps,
            height,
            color=color,
            marker=MARKERS[number % len(MARKERS)],
            label=_literal(role),
            **line,
        )
    longest = max(curves.values(), key=len)
    axes.set_xticks(range(len(longest)), _step_labels(longest))
    axes.set_xlabel(_step_name(longest))
    axes.set_ylim(bottom=min(ends))
    if len(curves) > 1:
        axes.legend()


def _step_labels(values: Sequence[Value]) -> list[str]:
    if all(value.note for value in values):
        return [_literal(value.note.split()[-1]) for value in values]
    return [str(number) for number in range(1, len(values) + 1)]


def _step_name(values: Sequence[Value]) -> str:
    return _literal(values[0].note.split()[0]) if all(v.note for v in values) else "step"


def attack_curves(
    records: dict[str, Columns],
) -> dict[str, tuple[list[float], list[float]]]:
    """False- and true-positive rates by attack, from the scores of forgotten and holdout text.

    Scores are oriented so that higher = likelier a member; log-probabilities above 0 would be
    losses, which point the other way, and are not drawn. NaN rows are left out.
    """
    for members, others in ATTACKED:
        if members in records and others in records:
            found = {
                name: _roc(records[members][name], records[others][name])
                for name in ATTACKS
                if name in records[members] and name in records[others]
            }
            return {name: curve for name, curve in found.items() if curve is not None}
    return {}


def _roc(members: Any, others: Any) -> tuple[list[float], list[float]] | None:
    positive, negative = (
        np.sort(group[np.isfinite(group)]) for group in (np.asarray(members), np.asarray(others))
    )
    if not len(positive) or not len(negative):
        return None
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    rates = [
        1 - np.searchsorted(group, thresholds, side="left") / len(group)
        for group in (negative, positive)
    ]
    return [0.0, *rates[0].tolist()], [0.0, *rates[1].tolist()]


def _present(results: Results) -> dict[str, Evaluation]:
    found = {"model": results.model, **results.others}
    return {role: found[role] for role in ROLES if role in found}


def _value(one: Evaluation, name: str) -> Value:
    return one.values.get(name, Value(math.nan))


def _draw_bars(axes: "Axes", name: str, shown: dict[str, Evaluation], profile: str) -> None:
    values = [_value(one, name) for one in shown.values()]
    heights = [value.value for value in values]
    lower, upper = _whiskers(values)
    colors, hatches = ([table[role] for role in shown] for table in (ROLES, HATCHES))
    places = range(len(values))
    axes.bar(places, heights, width=0.62, color=colors, hatch=hatches, edgecolor=PAPER)
    axes.errorbar(
        places, heights, yerr=[lower, upper], fmt="none", ecolor=INK, elinewidth=1.1, capsize=3
    )
    for place, value in zip(places, values, strict=True):
        if not math.isfinite(value.value):
            axes.annotate("n/a", (place, 0), ha="center", va="bottom", color=GREY, size=9)
    _number_bars(axes, name, values, profile)
    axes.set_title(QUESTIONS[name])
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="x", visible=False)


def _number_bars(axes: "Axes", name: str, values: Sequence[Value], profile: str) -> None:
    """Write each number beyond the end of its bar and of its interval."""
    for place, value in enumerate(values):
        if not math.isfinite(value.value):
            continue
        down = value.value < 0
        ends = [e for e in (value.lower, value.upper, value.value) if math.isfinite(e)]
        axes.annotate(
            format_number(name, value.value, profile),
            (place, min(ends) if down else max(ends)),
            (0, -4 if down else 4),
            textcoords="offset points",
            ha="center",
            va="top" if down else "bottom",
            size=9,
        )
    drawn = [e for v in values for e in (v.value, v.lower, v.upper) if math.isfinite(e)]
    low, high = min(0.0, *drawn), max(0.0, *drawn)
    room = 0.16 * ((high - low) or 1.0)
    axes.set_ylim(low - (room if low < 0 else 0), high + room)
    axes.axhline(0, color=GREY, linewidth=0.8)


def _whiskers(values: Sequence[Value]) -> tuple[list[float], list[float]]:
    """Lengths below and above; an interval need not hold its value, and a missing one is 0."""
    lower = [max(0.0, v.value - v.lower) if math.isfinite(v.lower) else 0.0 for v in values]
    upper = [max(0.0, v.upper - v.value) if math.isfinite(v.upper) else 0.0 for v in values]
    return lower, upper


def _radar_scores(results: Results, one: Evaluation, retrained: Evaluation) -> dict[str, float]:
    """By spoke. C5 and C6 are the share of the first step's value that the last one keeps."""
    scores = {}
    for name, title in RADAR.items():
        if name in one.values:
            now, then = _value(one, name).value, _value(retrained, name).value
            scores[title] = closeness(name, now, then, results.profile)
        elif one is results.model and len(steps := results.curves.get(name, [])) > 1:
            kept = steps[-1].value / steps[0].value if steps[0].value > 0 else math.nan
            scores[title] = min(1.0, max(0.0, kept)) if math.isfinite(kept) else kept
    return scores


def _dress_radar(axes: Any, angles: Any, spokes: Sequence[str]) -> None:
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1.0)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"], color=GREY, size=8)
    axes.set_rlabel_position(np.degrees(angles[1]) / 2)
    labels = [spoke.replace(" ", "\n", 1) for spoke in spokes]
    axes.set_xticks(angles, labels)
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):
        side = math.sin(angle)  # labels grow away from the ring, not over it
        sideways = "center" if abs(side) < 0.1 else ("left" if side > 0 else "right")
        label.set_horizontalalignment(sideways)
    axes.spines["polar"].set(color=INK, linewidth=1.2)


def _look(point: tradeoff.Point, number: int) -> dict[str, Any]:
    if point.role == "retrained":
        return {"marker": "*", "s": 260, "color": INK, "zorder": 3, "alpha": 0.85}
    if point.role == "before":
        return {"marker": "s", "s": 75, "color": ORANGE, "zorder": 3, "edgecolor": INK}
    decoy = point.role != "model"
    return {
        "marker": MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
        "s": 45 if decoy else 95,
        "color": PAPER if decoy else SERIES[number % len(SERIES)],
        "edgecolor": SERIES[number % len(SERIES)] if decoy else PAPER,
        "linewidth": 1.5 if decoy else 0.8,
        "zorder": 4,
    }


def _draw_front(axes: "Axes", front: Sequence[tradeoff.Point]) -> None:
    xs, ys = [point.x for point in front], [point.y for point in front]
    axes.plot(xs, ys, color=GREY, linewidth=1, linestyle="--", zorder=1)
    ring = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.2}
    axes.scatter(xs, ys, s=260, zorder=2, label="Pareto front", **ring)


def _patch(role: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=ROLES[role], hatch=HATCHES[role], edgecolor=PAPER, label=role)


def styled() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE)


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_bytes(figure: "Figure", form: Format) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None
    figure.savefig(stream, format=form, dpi=150, metadata=metadata)
    return stream.getvalue()


def _literal(label: str) -> str:
    """For matplotlib: no mathematics, and no half of a surrogate pair, which has no glyph."""
    return label.encode("utf-8", errors="replace").decode("utf-8").replace("$", r"\$")
