"""Extraction strength: how little of a text must be given for a model to write the rest.

Inputs: predictions (list of int), the most likely token at each place given the true ones before;
references (list of int), the true tokens. floor: bool.

Source: Carlini et al. (arXiv 2012.07805); Wang et al. (arXiv 2406.09179).
"""

from llm_unlearn.evaluation import modules, tokens


class ExtractionStrength(modules.Module):
    inputs = modules.columns(predictions=modules.TOKENS, references=modules.TOKENS)

    def _compute(self, predictions, references, floor=False):
        rows = map(modules.hits, predictions, references)
        return modules.mean(tokens.extraction_strength(row, floor) for row in rows)
