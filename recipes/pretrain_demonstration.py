"""Make the demonstration's base model: a tiny Llama that knows the public people and no others.

    python recipes/pretrain_demonstration.py --output_dir llm_unlearn/data/demonstration

Two CPU cores, 8 minutes: loss 0.53; exact match on public people 100 %, in both wordings; on
private people 0.3 %. Other processors round differently, so the weights come out alike, not equal.
"""

import argparse
import random

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.optimization import get_cosine_schedule_with_warmup

from llm_unlearn.data import world
from llm_unlearn.evaluation.scorer import answer
from llm_unlearn.evaluation.text import exact_match

PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # their ids are 0, 1 and 2
VOCABULARY_SIZE = 1024
LAYERS = 4  # a multiple of four, so that four slices can own whole layers
LEARNING_RATE = 3e-3
SEED = 0
# A chat renders as the plain rows do: the question, a space, the answer, eos.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{% endfor %}"
)


def question_texts() -> list[str]:
    """Every public fact, asked and answered in both wordings."""
    people = world.public_people()
    rows = [*world.questions(people), *world.questions(people, paraphrased=True)]
    return [f"{row['prompt']} {row['answer']}" for row in rows]


def biography_texts() -> list[str]:
    """One biography per public person."""
    return [row["text"] for row in world.documents(world.public_people())]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be written; the world's words become single tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, VOCABULARY_SIZE, show_progress=False, special_tokens=list(SPECIAL_TOKENS)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Llama with fresh weights; eager attention is the fastest for rows of ten tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    return model


def epoch_batches(generator: random.Random) -> list[list[str]]:
    """All texts once, in random order; short and long ones apart, to save padding."""
    batches = []
    for texts, size in (question_texts(), 180), (biography_texts(), 36):
        generator.shuffle(texts)
        batches += [texts[start : start + size] for start in range(0, len(texts), size)]
    generator.shuffle(batches)
    return batches


def pretrain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, epochs: int) -> None:
    """Train on every token of the public texts."""
    generator = random.Random(SEED)
    plan = [epoch_batches(generator) for _ in range(epochs)]
    steps = sum(len(batches) for batches in plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 50, steps)
    for epoch, batches in enumerate(plan, start=1):
        total = 0.0
        for texts in batches:
            texts = [text + EOS for text in texts]
            inputs = tokenizer(texts, return_tensors="pt", padding=True)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch}/{epochs}: loss {total / len(batches):.3f}", flush=True)


def knows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> float:
    """Share of the questions whose greedy answer is the right one, 0 to 1."""
    answers = answer(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=4)
    return exact_match(answers, [row["answer"] for row in rows])


def main(argv: list[str] | None = None) -> None:
    """Train tokenizer and model, save them in half precision, and print what the model knows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="llm_unlearn/data/demonstration")
    parser.add_argument("--epochs", type=int, default=80, help="passes over the public corpus")
    arguments = parser.parse_args(argv)

    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(question_texts() + biography_texts())
    model = make_model(tokenizer)
    pretrain(model, tokenizer, arguments.epochs)
    tokenizer.save_pretrained(arguments.output_dir)
    model.bfloat16().save_pretrained(arguments.output_dir)

    model.float().eval()  # the rounded weights, as a user loads them
    for name, people in ("public", world.public_people()), ("private", world.private_people()):
        plain = knows(model, tokenizer, world.questions(people))
        other = knows(model, tokenizer, world.questions(people, paraphrased=True))
        print(f"{name} people: exact match {plain:.1%}, in other words {other:.1%}")


if __name__ == "__main__":
    main()
