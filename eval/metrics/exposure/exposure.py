"""Exposure: how much surer a model is of secrets it was shown than of others of the same form.

Inputs: predictions (float), the loss of each secret; references (list of float), the losses of
other secrets that it might have been, without itself.

Source: Carlini et al. (arXiv 1802.08232).
"""

from llm_unlearn.evaluation import modules, tokens


class Exposure(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.NUMBERS)

    def _compute(self, predictions, references):
        rows = map(tokens.exposure, modules.numbers(predictions), references)
        return modules.mean(row.value for row in rows)
