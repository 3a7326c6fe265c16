"""Truth ratio: does a model prefer wrong answers to the paraphrased right one?

Inputs: predictions (float), the mean loss of each paraphrased right answer's tokens; references
(list of float), those of its wrong answers, as many in every row. forgotten (bool, required): is
it the forget set? mean: geometric or arithmetic.

Source: Maini et al., TOFU (arXiv 2401.06121), section 2.2.
"""

from typing import Literal

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.tofu import aggregate_truth_ratios, truth_ratio


class TruthRatio(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.NUMBERS)

    def _compute(
        self,
        predictions,
        references,
        *,
        forgotten,
        mean: Literal["geometric", "arithmetic"] = "geometric",
    ):
        ratios = truth_ratio(predictions, references, mean)
        return modules.mean(aggregate_truth_ratios([ratio], forgotten) for ratio in ratios)
