"""The flags of RUM: how `recipes/unlearn.py --refine` parts a forget set, and by what it unlearns the parts."""

from dataclasses import dataclass, field

from llm_unlearn.errors import UserError
from llm_unlearn.memorization.orientation import SCORES
from llm_unlearn.memorization.refinement import CONTROLS, PARTS
from llm_unlearn.unlearning import Gather


@dataclass
class RefineArguments:
    """How a forget set is refined; without `--refine` it is not."""

    refine: str | None = field(
        default=None,
        metadata={
            "help": "RUM: unlearn the forget set in subsets, parted by this memorization score, low to high."
        },
    )
    refine_with: list[str] | None = field(
        default=None,
        metadata={
            "help": "A method for each subset, least memorized first, or none (--method for all).",
            "action": Gather,
        },
    )
    refine_parts: int = field(default=PARTS, metadata={"help": "How many subsets."})
    refine_control: str = field(
        default="none",
        metadata={"help": "shuffle (random subsets) or vanilla (all at once), in as many steps."},
    )
    pending_in_retain: bool = field(
        default=False,
        metadata={
            "help": "Keep later subsets until their turn, as the paper does; not where a deletion is due."
        },
    )
    scores_of: str | None = field(
        default=None,
        metadata={"help": "Model or run whose training was tracked (default: the one to forget)."},
    )
    holdout: str | None = field(
        default=None, metadata={"help": "--refine holdout: data that the model never saw."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.refine_with, str):
            self.refine_with = [self.refine_with]
        if self.refine is None:
            if self.refine_with or self.refine_control != "none" or self.pending_in_retain:
                raise UserError("the flags of a refinement need --refine SCORE")
            return
        if self.refine not in SCORES:
            raise UserError(f"--refine {self.refine!r}: one of {', '.join(SCORES)}")
        if self.refine_control not in CONTROLS:
            raise UserError(
                f"--refine_control is one of {', '.join(CONTROLS)}, got {self.refine_control!r}"
            )
        if self.refine_with and len(self.refine_with) not in (1, self.refine_parts):
            raise UserError(
                f"--refine_with names a method for each of {self.refine_parts} subsets (or one for all), "
                f"got {len(self.refine_with)}"
            )

    def methods(self, default: str) -> list[str]:
        """A method's name, or `none`, for each subset, least memorised first."""
        given = self.refine_with or [default]
        return given * self.refine_parts if len(given) == 1 else given
