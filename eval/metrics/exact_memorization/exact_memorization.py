"""Exact memorization: the share of a text's tokens that are a model's first choice.

Inputs: predictions (list of int), the most likely token at each place given the true ones before;
references (list of int), the true tokens.

Source: Tirumala et al. (arXiv 2205.10770).
"""

from llm_unlearn.evaluation import modules, tokens


class ExactMemorization(modules.Module):
    inputs = modules.columns(predictions=modules.TOKENS, references=modules.TOKENS)

    def _compute(self, predictions, references):
        rows = map(modules.hits, predictions, references)
        return modules.mean(map(tokens.exact_memorization, rows))
