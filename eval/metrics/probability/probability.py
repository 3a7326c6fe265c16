"""Probability: length-normalised probability of the right answer.

Inputs: predictions (list of float), the log-probabilities of each answer's tokens.

Source: Maini et al., TOFU (arXiv 2401.06121), section 2.2.
"""

from llm_unlearn.evaluation import modules, tokens


class Probability(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBERS)

    def _compute(self, predictions):
        return modules.mean(map(tokens.answer_probability, predictions))
