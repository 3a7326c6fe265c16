"""The house keeps its own rules: imports flow one way, and the README's tree is the tree."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Who may import whom, from the bottom up; a package may import itself.
MAY_IMPORT = {
    "data": set(),
    "evaluation": {"data"},
    "exact": {"data", "memorization"},
    "approximate": {"data"},
    "memorization": {"data"},
    "memorizing": {"data", "exact", "approximate", "memorization", "models", "unlearning"},
    "export": {"data", "exact"},
    "leaderboard": {
        "data",
        "evaluation",
        "exact",
        "approximate",
        "demonstration",
        "launch",
        "memorization",
        "memorizing",
        "models",
        "unlearning",
    },
    "run_report": {"data", "evaluation", "exact"},
    "study": {"data", "evaluation", "exact", "console", "demonstration"},
    "hub": {"data", "exact"},
    "serving": {"data", "exact", "export"},
}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("llm_unlearn.")}
    return found


def test_imports_flow_one_way() -> None:
    examined = 0
    for package, allowed in MAY_IMPORT.items():
        modules = {p.stem for p in (ROOT / "llm_unlearn").glob("*.py")} - {
            "demonstration",
            "cli",
            "launch",
            "console",
            "models",
            "scoring",
            "attacking",
            "unlearning",
        }
        for path in (ROOT / "llm_unlearn" / package).rglob("*.py"):
            examined += 1
            wrong = imported_packages(path) - allowed - modules - {package}
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
    assert examined > 20


def test_library_does_not_import_recipes_or_tests() -> None:
    for path in (ROOT / "llm_unlearn").rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import) (recipes|tests|benchmarks)\b", path.read_text(), re.M
        ), path


def test_the_readme_shows_every_file() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        path = Path(name)
        if (
            path.suffix == ".py"
            and path.name != "__init__.py"
            and path.parts[0] in ("llm_unlearn", "recipes", "benchmarks", "eval")
            and path.parts[:2] not in (("eval", "metrics"), ("eval", "tasks"))
        ):
            assert path.name in tree, f"{name} is missing from the README's tree"


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in [*(ROOT / "llm_unlearn").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        text = path.read_text()
        unsafe = r"torch\.load\(|\bpickle\.|import pickle|trust_remote_code\s*=\s*True"
        assert not re.search(unsafe, text), path
