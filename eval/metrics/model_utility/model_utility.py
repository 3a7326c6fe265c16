"""Model utility: what a model still knows, as one number over three question sets.

Inputs: references (str), each row's set: retain, real_authors or world_facts; predictions (float),
ROUGE-L recall of its answer; answer_loss, paraphrased_loss (float) and wrong_losses (list of
float), mean losses of the answers' tokens.

Source: Maini et al., TOFU (arXiv 2401.06121), section 2.2.1.
"""

from llm_unlearn.evaluation import modules, tofu

SETS = {
    "retain": tofu.RETAIN,
    "real_authors": tofu.REAL_AUTHORS,
    "world_facts": tofu.WORLD_FACTS,
}
COLUMNS = ("answer_loss", "wrong_losses", "paraphrased_loss", "predictions")  # as tofu.FIELDS


class ModelUtility(modules.Module):
    inputs = modules.columns(
        predictions=modules.NUMBER,
        references=modules.TEXT,
        answer_loss=modules.NUMBER,
        paraphrased_loss=modules.NUMBER,
        wrong_losses=modules.NUMBERS,
    )

    def _compute(self, references, **columns):
        if odd := sorted(set(references) - set(SETS)):
            raise ValueError(f"expected references among {', '.join(SETS)}, got {', '.join(odd)}")
        log = {section: {field: {} for field in tofu.FIELDS} for section in SETS.values()}
        for field, column in zip(tofu.FIELDS, COLUMNS, strict=True):
            for row, (name, value) in enumerate(zip(references, columns[column], strict=True)):
                log[SETS[name]][field][row] = value
        result = tofu.model_utility(log)
        unscorable = sum(scores.n_unscorable for scores in result[1:])
        return {"value": result.value, **result.terms, "n_unscorable": unscorable}
