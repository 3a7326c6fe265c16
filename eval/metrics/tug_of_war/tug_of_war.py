"""Tug of War: how close a model is to the retrained one on forget, retain and test set at once.

Inputs: predictions (float), the model's accuracy on each set; references (float), the retrained
model's. attack and retrained_attack (float): replace the forget set's, which then comes first.

Source: Zhao et al. (arXiv 2406.01257).
"""

from llm_unlearn.evaluation import modules, utility


class TugOfWar(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.NUMBER)

    def _compute(self, predictions, references, attack=None, retrained_attack=None):
        if (attack is None) != (retrained_attack is None):
            raise ValueError("ToW-MIA needs both attack and retrained_attack")
        sets = [utility.FORGET, *map(str, range(1, len(predictions)))]
        model = dict(zip(sets, modules.numbers(predictions), strict=True))
        retrained = dict(zip(sets, modules.numbers(references), strict=True))
        if attack is None or retrained_attack is None:
            return {"value": utility.tug_of_war(model, retrained)}
        return {"value": utility.tug_of_war_attack(model, retrained, attack, retrained_attack)}
