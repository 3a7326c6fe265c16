"""Token entropy: how varied a model's answers are; low where it babbles one token over and over.

Inputs: predictions (list of int), the token ids of each answer.

Source: Yuan et al. (arXiv 2410.08109).
"""

from llm_unlearn.evaluation import modules, text


class TokenEntropy(modules.Module):
    inputs = modules.columns(predictions=modules.TOKENS)

    def _compute(self, predictions):
        return modules.mean(map(text.token_entropy, predictions))
