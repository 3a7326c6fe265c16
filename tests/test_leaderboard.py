"""The leaderboard: who passes what, its page and files, resuming, failures, and a real one (slow)."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_unlearn.console import exit_code_of, print_table
from llm_unlearn.data.records import make_records
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.evaluation.attacks.relearning import Curve
from llm_unlearn.evaluation.results import Evaluation, Results, Value, read_results
from llm_unlearn.evaluation.suites.demonstration import demonstration_tofu
from llm_unlearn.leaderboard import page, running
from llm_unlearn.leaderboard.page import print_leaderboard, write_leaderboard
from llm_unlearn.leaderboard.plan import AGAIN, BEFORE, RETRAINED, Benchmark, World
from llm_unlearn.leaderboard.running import AREA, RELEARNED, SECONDS, run
from llm_unlearn.leaderboard.standings import Leaderboard, Standing, criteria, read_leaderboard
from llm_unlearn.leaderboard.worlds import make_world
from tests.evaluation.folders import make_tofu_folder
from tests.test_recipes import load_recipe
from tests.tiny import make_rows

HOSTILE = "<script>alert('x')</script>"
NAN = math.nan
main = load_recipe("benchmark")


# What is passed.

TOFU = {
    # metric: (value, lower, upper) of a model that is like the retrained one
    "forget_quality": (0.3, NAN, NAN),
    "privleak": (-4.0, -15.0, 1.0),  # on a scale of 100
    "model_utility": (0.60, 0.55, 0.65),
    AREA: (0.02, NAN, NAN),
}
MUSE = {
    "forget_knowmem": (0.22, 0.18, 0.26),
    "privleak": (4.0, 2.0, 6.0),
    "retain_knowmem": (0.60, 0.55, 0.65),
    AREA: (0.02, NAN, NAN),
}
OF_RETRAINED = {"model_utility": 0.62, "forget_knowmem": 0.20, "retain_knowmem": 0.62}


def standing(values: Mapping[str, tuple[float, float, float]], name: str = "npo") -> Standing:
    reference = {metric: Value(value) for metric, value in OF_RETRAINED.items()}
    own = {metric: Value(*ends) for metric, ends in values.items()}
    return Standing(name, "approximate", own, reference, 1, 10.0, 40.0)


def judged(values: Mapping[str, tuple[float, float, float]]) -> dict[str, bool | None]:
    row = standing(values)
    return {one.metric: one.passes(row) for one in criteria(row.values)}


def test_what_is_like_retraining_passes() -> None:
    assert judged(TOFU) == dict.fromkeys(TOFU, True)
    assert judged(MUSE) == dict.fromkeys(MUSE, True)


NEARLY: list[tuple[str, tuple[float, float, float], bool | None]] = [
    ("forget_quality", (0.05, NAN, NAN), True),
    ("forget_quality", (0.0499, NAN, NAN), False),
    ("forget_quality", (NAN, NAN, NAN), None),
    # The interval, not the value, must meet [-5 %, 5 %].
    ("privleak", (-8.0, -11.0, -5.0), False),
    ("privleak", (76.0, -2.0, 154.0), False),
    ("privleak", (-4.9, -11.0, 1.0), True),
    ("privleak", (0.0, -60.0, 60.0), True),
    ("privleak", (5.0, NAN, NAN), True),
    ("privleak", (-5.1, NAN, NAN), False),
    ("privleak", (NAN, NAN, NAN), None),
    # 95 % of the retrained model's 0.62.
    ("model_utility", (0.5891, 0.0, 1.0), True),
    ("model_utility", (0.5889, 0.0, 1.0), False),
    ("model_utility", (0.99, 0.9, 1.0), True),
    ("model_utility", (NAN, NAN, NAN), None),
    (AREA, (0.05, NAN, NAN), True),
    (AREA, (0.051, NAN, NAN), False),
    (AREA, (-0.9, NAN, NAN), True),
    (AREA, (NAN, NAN, NAN), None),
]


@pytest.mark.parametrize(("metric", "ends", "verdict"), NEARLY)
def test_where_the_lines_are(
    metric: str, ends: tuple[float, float, float], verdict: bool | None
) -> None:
    assert judged({**TOFU, metric: ends}) == dict.fromkeys(TOFU, True) | {metric: verdict}


@pytest.mark.parametrize(("value", "verdict"), [(0.25, True), (0.251, False), (NAN, None)])
def test_muse_asks_what_is_still_known(value: float, verdict: bool | None) -> None:
    """At most the retrained model's 0.20 and five points."""
    found = judged({**MUSE, "forget_knowmem": (value, 0.0, 1.0)})
    assert found == dict.fromkeys(MUSE, True) | {"forget_knowmem": verdict}


def test_without_a_reference_nothing_is_claimed() -> None:
    alone = Standing("npo", "approximate", standing(MUSE).values, {}, 1, 10.0)
    told = {one.metric: one.passes(alone) for one in criteria(alone.values)}
    assert (told["forget_knowmem"], told["retain_knowmem"]) == (None, None)


# From results to rows.


def world(suite: Any = None) -> World:
    records = make_records(make_rows(6, 1), subject_column="subject")
    return World(
        "tiny", "base", records[:2], records[2:], suite or demonstration_tofu(), {"learning_rate": 1e-3}
    )  # fmt: skip


def benchmark(output: Path, rows: tuple[str, ...] = ("ga", "npo"), seeds: int = 1) -> Benchmark:
    return Benchmark(world(), rows, seeds, output)


def evaluation(
    role: str, seed: int = 0, **changes: tuple[float, float, float] | float
) -> Evaluation:
    given = {
        name: ends if isinstance(ends, tuple) else (ends, NAN, NAN)
        for name, ends in changes.items()
    }
    values = {name: Value(*ends) for name, ends in {**TOFU, **given}.items()}
    return Evaluation(role, role, f"{role} {seed}", values, cost={SECONDS: 10.0})


AS_RETRAINED = evaluation(RETRAINED, forget_quality=NAN, privleak=NAN, **{AREA: 0.0})
KNOWS = {"forget_quality": 1e-20, "privleak": (-90.0, -95.0, -85.0), AREA: 0.6}


def put(made: Benchmark, row: str, seed: int = 0, seconds: float = 10.0, **changes: Any) -> None:
    """A row as a benchmark writes it."""
    one = evaluation(row, seed, **changes)
    one.cost[SECONDS] = seconds
    others = {} if row == RETRAINED else {RETRAINED: AS_RETRAINED}
    if row not in (RETRAINED, BEFORE):
        others[BEFORE] = evaluation(BEFORE, **KNOWS)
    path = made.result(row, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    configuration = {"method": row, "seed": seed}
    Results("demo", "default", one, others, configuration=configuration).write(path)


def measured(output: Path) -> Benchmark:
    """References, one method that passes, one that forgets nothing, and an exact one without utility."""
    made = benchmark(output, ("exact (S3T)", "ga", "npo", "simnpo", "rmu"))
    put(made, RETRAINED, seconds=40.0, forget_quality=NAN, privleak=NAN, **{AREA: 0.0})
    put(made, BEFORE, seconds=50.0, **KNOWS)
    put(made, AGAIN, seconds=41.0)
    put(made, "npo", model_utility=0.61)
    put(made, "simnpo", model_utility=0.62)
    put(made, "ga", model_utility=(NAN, NAN, NAN), **KNOWS)
    put(made, "exact (S3T)", seconds=0.5, model_utility=0.1)
    return made


def test_rows_their_order_and_who_wins(tmp_path: Path) -> None:
    board = read_leaderboard(measured(tmp_path))
    assert [(row.name, row.kind, board.passed(row)) for row in board.rows] == [
        (AGAIN, "reference", 4),
        (RETRAINED, "reference", 2),  # it is no reference of itself
        (BEFORE, "reference", 1),
        ("exact (S3T)", "exact", 3),
        ("simnpo", "approximate", 4),
        ("npo", "approximate", 4),
        ("ga", "approximate", 0),
    ]
    assert board.winners() == ["simnpo", "npo"], "references do not compete"
    assert board.missing == ["rmu"]
    costs = {row.name: (row.seconds, row.retraining) for row in board.rows}
    assert costs["exact (S3T)"] == (0.5, 40.0)


def test_seeds_become_an_interval(tmp_path: Path) -> None:
    made = benchmark(tmp_path, ("npo",), seeds=3)
    for seed, utility in enumerate((0.60, 0.62, 0.64)):
        for row in (RETRAINED, BEFORE):
            put(made, row, seed)
        put(made, "npo", seed, seconds=10.0 + seed, model_utility=utility)
    board = read_leaderboard(made)
    (row,) = [row for row in board.rows if row.name == "npo"]
    # Student's t with two degrees of freedom: 4.303 * 0.02 / sqrt(3).
    value = row.values["model_utility"]
    assert (value.value, value.upper - value.value) == pytest.approx((0.62, 0.04968), abs=1e-4)
    assert (row.seeds, row.seconds) == (3, 11.0)


def test_files_hold_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = read_leaderboard(measured(tmp_path))
    paths = write_leaderboard(board, tmp_path, "python recipes/benchmark.py")
    assert [path.name for path in paths] == [
        f"leaderboard.{kind}" for kind in ("html", "csv", "json")
    ]
    content = json.loads(paths[2].read_text())
    assert content == board.to_dict() and "NaN" not in paths[2].read_text()
    ga = next(row for row in content["rows"] if row["name"] == "ga")
    assert ga["passes"] == {
        "forget quality p": False, "PrivLeak": False, "utility": None, "relearned faster": False,
    }  # fmt: skip
    assert ga["values"]["model_utility"] == {"value": None, "lower": None, "upper": None}
    assert (content["pass_everything"], content["missing"]) == (["simnpo", "npo"], ["rmu"])
    with paths[1].open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert list(rows) == [row.name for row in board.rows]
    assert float(rows["npo"]["privleak lower"]) == -15.0 and rows["npo"]["passes"] == "4"
    assert rows["ga"]["model_utility"] == "" and rows["npo"][f"{AREA} upper"] == ""
    html = paths[0].read_text()
    assert "Passes everything: simnpo, npo." in html and "Not measured: rmu." in html
    assert "data:image/" in html
    print_leaderboard(board, print_table)
    shown = capsys.readouterr().out
    for told in ("simnpo", "-4.0 %", "0.25×", "4 of 4", "0.01×"):
        assert told in html and told in shown
    assert "nan" not in shown


def test_the_page_escapes_names_and_the_command(tmp_path: Path) -> None:
    row = standing(TOFU, HOSTILE)
    honest = read_leaderboard(measured(tmp_path))
    board = Leaderboard(HOSTILE, criteria(row.values), [row], honest.plane, [HOSTILE])
    (path, _, _) = write_leaderboard(board, tmp_path, f"python benchmark.py --output_dir {HOSTILE}")
    html = path.read_text()
    assert HOSTILE not in html and html.count("&lt;script&gt;") >= 4


def test_nothing_passes_is_said(tmp_path: Path) -> None:
    made = benchmark(tmp_path, ("ga",))
    for row in (RETRAINED, BEFORE, "ga"):
        put(made, row, **KNOWS)
    (path, _, _) = write_leaderboard(read_leaderboard(made), tmp_path, "")
    assert "Nothing passes everything." in path.read_text()


def test_references_alone_are_a_leaderboard(tmp_path: Path) -> None:
    made = benchmark(tmp_path)
    with pytest.raises(UserError, match="holds no results"):
        read_leaderboard(made)
    put(made, RETRAINED)
    put(made, BEFORE)
    board = read_leaderboard(made)
    assert board.missing == [AGAIN, "ga", "npo"]
    write_leaderboard(board, tmp_path, "")


def test_cells_mark_what_is_judged(tmp_path: Path) -> None:
    board = read_leaderboard(measured(tmp_path))
    by_name = {
        row.name: dict(zip(page.heads(board), page.cells(board, row), strict=True))
        for row in board.rows
    }
    assert by_name["npo"]["PrivLeak"].style == "good" and "✓" in by_name["npo"]["PrivLeak"].text
    assert by_name["ga"]["PrivLeak"].style == "bad" and "✗" in by_name["ga"]["PrivLeak"].text
    assert by_name["ga"]["utility"] == page.Cell(page.DASH)
    assert by_name["npo"]["relearned faster"].text == "+0.02 ✓"


# The loop, with nothing trained and nobody asked.


class Loop:
    """Stands in for models: what was trained, unlearned and evaluated, in order."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, broken: Mapping[str, Exception] | None = None
    ):
        self.done: list[str] = []
        self.broken = dict(broken or {})
        self.held: dict[str, list[str]] = {}
        for name, stub in {
            "load_base": lambda *_: (SimpleNamespace(), None),
            "with_adapter": lambda model, *_, **__: model,
            "load_model": lambda path: SimpleNamespace(model=path, tokenizer=None),
            "fine_tune": self.fine_tune,
            "keep_observations": lambda *_: None,
            "unlearn": self.unlearn,
        }.items():
            monkeypatch.setattr(running, name, stub)
        monkeypatch.setattr(running._Row, "_session", lambda row: self)
        monkeypatch.setattr(running._Row, "_relearn", lambda row, *_: self.relearn(row))

    def fine_tune(
        self, model: Any, tokenizer: Any, records: Any, config: Any, lora: Any, observer: Any
    ) -> None:
        name = Path(config.output_dir).name
        assert (observer is not None) == (
            name == "before"
        )  # whose records rows of RUM are parted by
        self._break(name)
        Path(config.output_dir).mkdir(parents=True)
        self.done.append(f"{name}: {len(records)} records, seed {config.seed}")

    def unlearn(
        self, model: Any, tokenizer: Any, forget: Any, retain: Any, config: Any, method: Any
    ) -> None:
        self._break(config.method)
        self.done.append(
            f"{config.method}: {len(forget)} of {len(forget) + len(retain)}, seed {config.seed}"
        )

    def _break(self, name: str) -> None:
        if name in self.broken:
            raise self.broken[name]

    def evaluate(self, candidate: Any, role: str) -> Evaluation:
        candidate.load()
        return evaluation(candidate.label, len(self.done))

    def conclude(self, model: Evaluation, others: dict[str, Evaluation]) -> Results:
        self.held[model.label] = list(others)
        return Results("demo", "default", model, others)

    def relearn(self, row: Any) -> Curve:
        steps = row.benchmark.world.relearning.steps
        knows = 0.5 if row.name == "ga" else 0.1
        return Curve(steps, (0.0, *[knows] * (len(steps) - 1)), row.seed)


def test_every_row_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, made, said = Loop(monkeypatch), benchmark(tmp_path), []
    assert run(made, said.append) == []
    assert said == [f"{row}, seed 0" for row in (RETRAINED, BEFORE, AGAIN, "ga", "npo")]
    assert loop.done == [
        "retrained: 4 records, seed 0", "before: 6 records, seed 0", "retrained-again: 4 records, seed 1000",
        "ga: 2 of 2, seed 0",  # it needs no retain data
        "npo: 2 of 6, seed 0",
    ]  # fmt: skip
    assert loop.held == {
        RETRAINED: [], BEFORE: [RETRAINED], AGAIN: [RETRAINED, BEFORE], "ga": [RETRAINED, BEFORE],
        "npo": [RETRAINED, BEFORE],
    }  # fmt: skip
    ga = read_results(made.result("ga", 0)).model.values
    # 0.4 above the retrained curve from the second step (10 of 100) on: (0.4 / 2 * 10 + 0.4 * 90) / 100.
    assert (ga[AREA].value, ga[RELEARNED].value) == pytest.approx((0.38, 0.5))
    # Again: nothing is done; one row gone: that row alone; another seed: all of it.
    assert run(made, said.append) == [] and len(loop.done) == 5
    made.result("npo", 0).unlink()
    run(made, said.append)
    assert loop.done[5:] == ["npo: 2 of 6, seed 0"]
    run(benchmark(tmp_path, seeds=2), said.append)
    assert loop.done[6:] == [
        "retrained: 4 records, seed 1", "before: 6 records, seed 1", "retrained-again: 4 records, seed 1001",
        "ga: 2 of 2, seed 1", "npo: 2 of 6, seed 1",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [UserError("no such\nlayer"), RuntimeError("no such\nlayer")])
def test_a_row_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    loop, made = Loop(monkeypatch, {"ga": error}), benchmark(tmp_path)
    assert run(made, lambda _: None) == ["ga, seed 0: no such layer"]
    assert read_leaderboard(made).missing == ["ga"]
    loop.broken = {}
    assert run(made, lambda _: None) == []
    assert loop.done[-1].startswith("ga") and read_leaderboard(made).missing == []


def test_without_a_retrained_model_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were held against nothing would stay as they are when the run goes on."""
    loop, made = Loop(monkeypatch, {"retrained": UserError("disk full")}), benchmark(tmp_path)
    failures = run(made, lambda _: None)
    assert failures[0] == "retrained, seed 0: disk full" and len(failures) == 5
    assert loop.done == [] and not list(tmp_path.rglob("results.json"))


def test_a_method_that_diverged_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `unlearn` wrote is its last good state; without that there is nothing to measure."""
    Loop(monkeypatch, {"ga": RunError("no number"), "npo": RunError("no number")})
    made = benchmark(tmp_path)
    report = made.model("ga", 0) / running.REPORT_NAME
    report.parent.mkdir(parents=True)
    report.write_text("{}")
    assert run(made, lambda _: None) == ["npo, seed 0: no number"]
    assert made.result("ga", 0).exists()


def test_an_exact_row_is_held_against_a_run_that_never_had_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, made = Loop(monkeypatch), benchmark(tmp_path, ("exact (experts)",))
    asked: list[Any] = []

    def fake_run(row: Any, name: str, records: Any) -> Any:
        ledger = SimpleNamespace(requests=list)
        shape = SimpleNamespace(name_or_path="base")
        asked.append((name, len(records)))
        return SimpleNamespace(
            directory=SimpleNamespace(ledger=ledger, shape=shape), delete=asked.append, path=tmp_path / "run",
            rebuild=lambda: asked.append("rebuilt"), ensemble=lambda: name,
        )  # fmt: skip

    monkeypatch.setattr(running._Row, "_run", fake_run)
    assert run(made, lambda _: None) == []
    assert asked == [("trained", 6), ["person 0", "person 1"], "rebuilt", ("without", 4)]
    assert loop.held["exact (experts)"] == [RETRAINED, BEFORE]
    assert read_results(made.result("exact (experts)", 0)).model.values[AREA].value == 0


def test_a_directory_is_one_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Loop(monkeypatch)
    made = benchmark(tmp_path, ())
    run(made, lambda _: None)
    other = Benchmark(World(**{**vars(made.world), "base": "another"}), (), 1, tmp_path)
    with pytest.raises(UserError, match="holds another benchmark"):
        run(other, lambda _: None)


# The recipe.


def benchmarked(*arguments: object) -> int:
    return exit_code_of(lambda: main([str(argument) for argument in arguments]))


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., list[object]]:
    """Flags for own data; `own(forget=3)` is a forget file of three subjects."""
    folder = make_tofu_folder(tmp_path / "suite", n=2)

    def make(forget: int = 2, first_kept: int = 2) -> list[object]:
        rows = make_rows(6, 1)
        for name, part in {"forget": rows[:forget], "retain": rows[first_kept:]}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(part))
        files = ("--forget", tmp_path / "forget.json", "--retain", tmp_path / "retain.json")
        return ["--base", "tiny", *files, "--suite", folder]

    return make


def test_report_only_reads_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    measured(tmp_path)
    loop = Loop(monkeypatch)
    chosen = ("--methods", "npo", "ga", "--exact", "s3t", "--output_dir", tmp_path)
    assert benchmarked(*chosen, "--report_only") == 0
    shown = capfd.readouterr()
    assert "Unlearning on demo" in shown.out and "passes everything: npo" in shown.out
    assert not shown.err and loop.done == []
    assert "recipes/benchmark.py --methods npo ga" in (tmp_path / "leaderboard.html").read_text()
    assert benchmarked(*chosen, "--report_only", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "leaderboard.json").read_text())
    assert printed["pass_everything"] == ["npo"]


def test_failures_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    Loop(monkeypatch, {"ga": UserError("no such layer")})
    chosen = ("--methods", "npo", "ga", "--exact", "--output_dir", tmp_path)
    assert benchmarked(*chosen) == 0
    shown = capfd.readouterr()
    assert "warning: ga, seed 0: no such layer" in shown.err
    assert "npo, seed 0" in shown.err.splitlines(), "a log of a long night wants lines"
    assert read_results(tmp_path / "results" / "npo" / "seed-0").configuration["method"] == "npo"


SETTINGS = {
    "magic: {}": "expected some of fine_tuning, unlearning",
    "- npo": "expected some of fine_tuning, unlearning",
    "fine_tuning: {": "cannot read --settings",
    "fine_tuning: [1]": "expected flags and their values",
    "fine_tuning: {learning_rat: 1}": "fine_tuning: unknown flag: --learning_rat 1",
    "unlearning: {learning_rate: high}": "invalid float value: 'high'",
    "unlearning_of: {magic: {}}": "unlearning_of: unknown method 'magic'",
    "methods: {npo: {gamma: 1}}": "methods: unknown flag: --gamma 1",
    "exact: {sisa: --lora_r 2}": "unknown method 'sisa': one of experts, s3t",
}
MISTAKES: list[tuple[list[str], str]] = [
    (["--methods", "magic"], "unknown method 'magic': one of ga, graddiff, npo"),
    (["--exact", "sisa"], "unknown --exact 'sisa': experts or s3t"),
    (["--seeds", "0"], "--seeds must be at least 1"),
    (["--seeds", "few"], "invalid int value: 'few'"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--suite", "magic"], "the demonstration asks as tofu or muse, not 'magic'"),
    (["--report_only"], "holds no results"),
    (["--settings", "nowhere.yaml"], "cannot read --settings nowhere.yaml"),
    (["--base", "tiny"], "needs all three of --forget, --retain and --base"),
    (["--forget", "x.json", "--retain", "y.json"], "needs all three"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(
    tmp_path: Path, capfd: Any, arguments: list[str], message: str
) -> None:
    assert benchmarked(*arguments, "--output_dir", tmp_path / "out") == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "out" / "models").exists()


@pytest.mark.parametrize(("text", "message"), SETTINGS.items())
def test_mistakes_in_settings_are_found_before_anything_is_trained(
    tmp_path: Path, capfd: Any, text: str, message: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert benchmarked("--settings", path, "--output_dir", tmp_path / "out") == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "out" / "models").exists()


def given(*arguments: object) -> Any:
    """The world of a command line."""
    read = main.__globals__["read_arguments"]
    return make_world(read([str(argument) for argument in arguments]))


def test_settings_are_read_as_flags_are(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "fine_tuning: {learning_rate: 1e-4, num_train_epochs: 3}\n"  # to YAML 1e-4 is a text
        "unlearning_of: {npo: {max_steps: 5}}\nmethods: {npo: {beta: 5e-1}}\n"
        "exact: {s3t: --lora_r 2 --num_slices 2}\n"
    )
    made = given("--settings", path, "--output_dir", tmp_path)
    assert made.fine_tuning == {"learning_rate": 1e-4, "num_train_epochs": 3}
    assert made.unlearning_of == {"npo": {"max_steps": 5}} and made.methods == {
        "npo": {"beta": 0.5}
    }
    assert made.exact == {"s3t": ["--lora_r", "2", "--num_slices", "2"]}
    assert made.unlearning == given("--output_dir", tmp_path).unlearning, "the others stay"


def test_own_data(own: Callable[..., list[object]]) -> None:
    made = given(*own(), "--subject_column", "subject")
    assert (made.name, made.base, len(made.forget), len(made.retain)) == ("forget", "tiny", 2, 4)
    # Rows are counted file by file, and the first of one is not the first of the other.
    made = given(*own(), "--rows_per_subject", 1)
    assert not {one.subject for one in made.forget} & {one.subject for one in made.retain}
    assert given(*own(), "--exact").forget, "without exact rows nobody need be known"
    with pytest.raises(UserError, match="needs to know who can ask for deletion"):
        given(*own())
    with pytest.raises(UserError, match="1 of 4 retain records are in the forget set too"):
        given(*own(forget=3), "--exact")
    with pytest.raises(UserError, match="no such dataset file"):
        given("--base", "x", "--forget", "x.json", "--retain", "y.json")


def test_a_subject_in_both_files_cannot_be_deleted_exactly(
    own: Callable[..., list[object]], tmp_path: Path
) -> None:
    flags = [*own(), "--subject_column", "subject"]
    more = [{**row, "prompt": f"{row['prompt']} And then?"} for row in make_rows(6, 1)[1:]]
    (tmp_path / "retain.json").write_text(json.dumps(more))
    with pytest.raises(UserError, match="'person 1' has records in --forget and in --retain"):
        given(*flags)
    assert given(*flags, "--exact").retain


@pytest.mark.slow
def test_the_demonstration_from_end_to_end(tmp_path: Path, capfd: Any) -> None:
    """Retraining passes what it should, the model before does not, and NPO lies between."""
    chosen = ("--methods", "npo", "--exact", "--output_dir", tmp_path)
    assert benchmarked(*chosen) == 0
    shown = capfd.readouterr()
    assert "warning" not in shown.err
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert set(rows) == {RETRAINED, BEFORE, AGAIN, "npo"} and not content["missing"]
    again, before, npo = (rows[name] for name in (AGAIN, BEFORE, "npo"))
    assert again["passes"]["forget quality p"] and again["passes"]["utility"]
    assert not before["passes"]["forget quality p"] and not before["passes"]["PrivLeak"]
    known = {name: row["values"]["forget_probability"]["value"] for name, row in rows.items()}
    assert known["npo"] < known[BEFORE] > known[AGAIN]
    assert 0 < npo["seconds"] < npo["retraining_seconds"] * 2
    # Once more: nothing is trained, and the page is the same.
    page_before = (tmp_path / "leaderboard.html").read_text()
    assert benchmarked(*chosen) == 0
    assert (tmp_path / "leaderboard.html").read_text() == page_before
