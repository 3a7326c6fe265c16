"""Write world_public.json and world_private.json: multiple choice about the demonstration's people.

    python eval/tasks/make_world.py [FOLDER]

The base model of the demonstration has read about the public people and has never met the private ones.
"""

import json
import random
import sys
from pathlib import Path

from llm_unlearn.data import world

PEOPLE = 48
CHOICES = 4


def make_rows(people: list[world.Person], seed: int = 0) -> list[dict[str, object]]:
    """One row per fact: `question`, `choices` and the index `answer` of the right one."""
    generator = random.Random(seed)
    rows = []
    for row in world.questions(people):
        others = [v for v in world.ATTRIBUTES[row["attribute"]].values() if v != row["answer"]]
        choices = [row["answer"], *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        rows.append(
            {
                "question": row["prompt"],
                "choices": choices,
                "answer": choices.index(row["answer"]),
            }
        )
    return rows


def main(folder: Path) -> None:
    for name, people in (
        ("public", world.public_people()[:PEOPLE]),
        ("private", world.private_people()[:PEOPLE]),
    ):
        rows = ",\n".join(json.dumps(row) for row in make_rows(people))
        (folder / f"world_{name}.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
