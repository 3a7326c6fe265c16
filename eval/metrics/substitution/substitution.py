"""Substitution: does a model give retained people's facts in place of the forgotten one's?

Inputs: predictions (str), the answers; references (list of str), the asked subject's own facts;
questions (str). others_facts (list of str, required): facts or names of retained subjects.

Source: llm-unlearn; published forgetting metrics reward what it measures.
"""

from llm_unlearn.evaluation import modules, text


class Substitution(modules.Module):
    inputs = modules.columns(
        predictions=modules.TEXT, references=modules.TEXTS, questions=modules.TEXT
    )

    def _compute(self, predictions, references, questions, *, others_facts):
        facts = [text.Facts(others_facts)] * len(predictions)
        return modules.mean(map(text.substitution, predictions, references, facts, questions))
