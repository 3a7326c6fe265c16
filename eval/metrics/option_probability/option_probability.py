"""Option probability: the right answer's share of the probability of all options.

Inputs: predictions (float), the mean loss of each right answer's tokens; references (list of
float), those of its wrong answers, as many in every row.

Source: Maini et al., TOFU (arXiv 2401.06121), section 2.2.1.
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.tofu import probability


class OptionProbability(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.NUMBERS)

    def _compute(self, predictions, references):
        return modules.mean(probability(predictions, references))
