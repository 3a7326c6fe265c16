"""Refusal: the share of answers that say that they do not answer.

Inputs: predictions (str), the answers.

Source: llm-unlearn; phrases as models are trained to say instead of an answer.
"""

from llm_unlearn.evaluation import modules, text


class Refusal(modules.Module):
    inputs = modules.columns(predictions=modules.TEXT)

    def _compute(self, predictions):
        return modules.mean(float(text.is_refusal(prediction)) for prediction in predictions)
