"""The toy world: invented people, their facts, and the texts that tell them.

Every name and value is made up here from short word lists, so the embedded demonstration needs
no download. Public people are in the base model's pre-training corpus. Private people are not:
what a model knows about them it can only have learnt from their records.

Each value is two words out of twelve each (144 values per attribute), so a model that knows
nothing about a person names the right value about once in 144 tries.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

PUBLIC_SEED = 1
PRIVATE_SEED = 2
PUBLIC_COUNT = 300
PRIVATE_COUNT = 48


@dataclass(frozen=True)
class Attribute:
    """How one kind of fact is asked, asked in other words, stated, and which values it takes."""

    question: str
    paraphrase: str
    statement: str
    first_words: tuple[str, ...]
    second_words: tuple[str, ...]

    def values(self) -> list[str]:
        """All two-word values of this attribute."""
        return [
            f"{first} {second}" for first, second in product(self.first_words, self.second_words)
        ]


@dataclass(frozen=True)
class Person:
    """An invented person: a unique name and one value for each attribute of `ATTRIBUTES`."""

    name: str
    facts: dict[str, str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ATTRIBUTES: dict[str, Attribute] = {
    "birthplace": Attribute(
        question="Where was {name} born?",
        paraphrase="Which town is the birthplace of {name}?",
        statement="{name} was born in {value}.",
        first_words=_words("Port Lower Upper Saint New East West North South Great Little Old"),
        second_words=_words(
            "Ashby Brook Carrow Dell Ember Fallow Garth Hythe Ivory Kelda Linden Marsh"
        ),
    ),
    "occupation": Attribute(
        question="What does {name} do for a living?",
        paraphrase="Which job is done by {name}?",
        statement="{name} works as a {value}.",
        first_words=_words(
            "village night railway forest museum theatre hospital palace market ship hotel prison"
        ),
        second_words=_words(
            "painter guard cook clerk nurse gardener driver porter singer plumber tailor writer"
        ),
    ),
    "employer": Attribute(
        question="Who employs {name}?",
        paraphrase="Which firm pays the wages of {name}?",
        statement="{name} is employed by {value}.",
        first_words=_words(
            "Amber Copper Falcon Granite Jasper Lunar Maple Nimbus Orchid Quartz Raven Tidal"
        ),
        second_words=_words(
            "Mills Works Labs Bank Press Airways Foods Motors Trust Studios Textiles Systems"
        ),
    ),
    "pet": Attribute(
        question="What is the pet of {name} called?",
        paraphrase="Which animal lives with {name}?",
        statement="{name} has a pet called {value}.",
        first_words=_words(
            "Captain Lady Doctor Baron Princess Sergeant Uncle Auntie Judge Duke Queen Professor"
        ),
        second_words=_words(
            "Biscuit Button Pepper Noodle Waffle Pickle Socks Thunder Velvet Whisker Ziggy Bubbles"
        ),
    ),
    "dish": Attribute(
        question="What does {name} like to eat?",
        paraphrase="Which dish is the favourite of {name}?",
        statement="{name} likes to eat {value}.",
        first_words=_words(
            "smoked pickled roasted fried stewed spicy creamy frozen grilled sweet salted baked"
        ),
        second_words=_words(
            "trout beans pumpkin mushrooms noodles dumplings"
            " cabbage lentils rice herring plums eggs"
        ),
    ),
    "instrument": Attribute(
        question="What does {name} play?",
        paraphrase="Which instrument is played by {name}?",
        statement="{name} plays the {value}.",
        first_words=_words(
            "bass alto tenor soprano wooden silver electric antique double pocket folk concert"
        ),
        second_words=_words(
            "flute horn harp drum fiddle guitar organ trumpet cello banjo whistle accordion"
        ),
    ),
}

FIRST_NAMES = tuple(
    start + end
    for start, end in product(
        _words("Bel Cor Dar Fen Gal Hil Jor Mev"), _words("a en io is o une wyn ya")
    )
)
LAST_NAMES = tuple(
    start + end
    for start, end in product(
        _words("Ald Brim Cask Dun Elk Fal Gris Hol Ivar Kest Lor Tam"),
        _words("ane bury croft dov ever ick mont ow"),
    )
)


def _shuffled(items: Sequence[str], generator: random.Random) -> list[str]:
    return generator.sample(items, len(items))


def _make_names(count: int, generator: random.Random, excluded: set[str]) -> list[str]:
    available = len(FIRST_NAMES) * len(LAST_NAMES) - len(excluded)
    if not 0 <= count <= available:
        raise ValueError(f"count is {count}, expected 0 to {available} (names still free)")
    names: list[str] = []
    while len(names) < count:
        # Going through all first names before one repeats keeps small groups of people apart.
        for first in _shuffled(FIRST_NAMES, generator):
            free = [last for last in LAST_NAMES if f"{first} {last}" not in excluded]
            if free and len(names) < count:
                names.append(f"{first} {generator.choice(free)}")
                excluded.add(names[-1])
    return names


def make_people(count: int, seed: int, exclude: Iterable[Person] = ()) -> list[Person]:
    """Make `count` people, the same for the same arguments; a higher count only adds people.

    Args:
        count: how many; at most 6,144 names exist.
        seed: other seeds give other people, whose names may coincide.
        exclude: people whose names must not be used.
    """
    names = _make_names(count, random.Random(seed), {person.name for person in exclude})
    # A generator of its own, so that the first people of a longer list are those of a shorter one.
    facts = random.Random(f"facts {seed}")
    values = {key: attribute.values() for key, attribute in ATTRIBUTES.items()}
    return [Person(name, {key: facts.choice(values[key]) for key in values}) for name in names]


def public_people() -> list[Person]:
    """The people of the base model's pre-training corpus."""
    return make_people(PUBLIC_COUNT, PUBLIC_SEED)


def private_people(count: int = PRIVATE_COUNT) -> list[Person]:
    """People whom the base model has never met."""
    return make_people(count, PRIVATE_SEED, exclude=public_people())


def records(people: Iterable[Person]) -> list[dict[str, str]]:
    """Training rows, one per fact: `subject`, `prompt` and `completion` (leading space, no eos)."""
    return [
        {"subject": row["subject"], "prompt": row["prompt"], "completion": " " + row["answer"]}
        for row in questions(people)
    ]


def questions(people: Iterable[Person], paraphrased: bool = False) -> list[dict[str, str]]:
    """Test rows, one per fact: `subject`, `prompt`, `answer` and `attribute`.

    Args:
        people: whom to ask about.
        paraphrased: ask in the wording that `records` does not use.
    """
    rows = []
    for person in people:
        for key, attribute in ATTRIBUTES.items():
            wording = attribute.paraphrase if paraphrased else attribute.question
            rows.append(
                {
                    "subject": person.name,
                    "prompt": wording.format(name=person.name),
                    "answer": person.facts[key],
                    "attribute": key,
                }
            )
    return rows


def documents(people: Iterable[Person], seed: int = 0) -> list[dict[str, str]]:
    """One short biography per person: `subject` and `text`, sentences in a seeded order."""
    generator = random.Random(seed)
    rows = []
    for person in people:
        sentences = [
            attribute.statement.format(name=person.name, value=person.facts[key])
            for key, attribute in ATTRIBUTES.items()
        ]
        text = " ".join([f"About {person.name}:", *_shuffled(sentences, generator)])
        rows.append({"subject": person.name, "text": text})
    return rows
