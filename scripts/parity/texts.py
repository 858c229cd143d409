"""Made-up words, pairs of them in every format, and tokenizers trained on them: a seed is all that they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
SYLLABLES = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]
SYLLABLES += ["an", "el", "ir", "os", "ur", "tha", "sho", "kri", "plo", "stru"]
# What a byte-level tokenizer splits in ways of its own: accents, other scripts, an emoji, digits, spaces, a contraction.
ODDITIES = (
    "naïve",
    "Überfluß",
    "漢字",
    "данные",
    "🙂🙃",
    "3.1415",
    "x_y-z",
    "don't",
    "  two",
    "tab\there",
    "(so)",
    "—",
)
PAIRS, HELD_OUT = 48, 11


class Writer:
    """Writes sentences of made-up words."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        counts = self.random.integers(1, 4, size=240)
        self.words = sorted({"".join(self.random.choice(SYLLABLES, size=n)) for n in counts})
        # Some words are common, as in a language, so that a tokenizer finds something to merge.
        shares = 1.0 / (np.arange(len(self.words)) + 4.0)
        self.shares = self.random.permutation(shares / shares.sum())

    def sentence(self, low: int, high: int, odd: float = 0.0) -> str:
        """Between `low` and `high` words, each an oddity with probability `odd`."""
        found = [
            str(word)
            for word in self.random.choice(self.words, int(self.random.integers(low, high + 1)), p=self.shares)
        ]
        for i in range(len(found)):
            if self.random.random() < odd:
                found[i] = str(self.random.choice(ODDITIES))
        return " ".join(found)

    def answers(self, low: int = 1, high: int = 16, odd: float = 0.0) -> tuple[str, str]:
        return self.sentence(low, high, odd), self.sentence(low, high, odd)


def plain(writer: Writer, count: int) -> list[Row]:
    """Prompts that end in a colon, answers that begin with a space."""
    rows = []
    for _ in range(count):
        chosen, rejected = writer.answers()
        rows.append({"prompt": writer.sentence(2, 14) + ":", "chosen": " " + chosen, "rejected": " " + rejected})
    return rows


def rough(writer: Writer, count: int) -> list[Row]:
    """What people have: a prompt that ends in a space or inside a word, answers without a space, the end written out, nothing at all."""
    rows = []
    for i in range(count):
        prompt, (chosen, rejected) = writer.sentence(1, 9, odd=0.2), writer.answers(odd=0.2)
        if i % 6 == 0:
            prompt += " "
        elif i % 6 == 1:
            chosen, rejected = chosen.replace(" ", "\n\n", 1), "\n" + rejected
        elif i % 6 == 2:
            prompt, chosen, rejected = prompt + " shostru", "stru " + chosen, "strukri"
        elif i % 6 == 3:
            chosen, rejected = " " + chosen + "<|end|>", "" if i % 4 == 1 else " " + rejected
        elif i % 6 == 4:
            prompt, chosen = prompt + "\n", chosen.upper()
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def implicit(writer: Writer, count: int) -> list[Row]:
    """No prompt column: it is what both answers begin with."""
    rows = []
    for row in rough(writer, count):
        chosen, rejected = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
        if chosen != rejected and chosen and rejected:
            rows.append({"chosen": chosen, "rejected": rejected})
    return rows


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(writer: Writer, count: int) -> list[Row]:
    """Conversations of one to three turns, with and without a system's word."""
    rows = []
    for i in range(count):
        turns = [_message("system", writer.sentence(2, 6))] if i % 3 == 0 else []
        for _ in range(i % 2):
            turns += [_message("user", writer.sentence(2, 6)), _message("assistant", writer.sentence(2, 6, odd=0.2))]
        turns.append(_message("user", writer.sentence(2, 10, odd=0.1)))
        answers = [[_message("assistant", text)] for text in writer.answers(odd=0.1)]
        rows.append({"prompt": turns, "chosen": answers[0], "rejected": answers[1]})
    return rows


def implicit_chat(writer: Writer, count: int) -> list[Row]:
    """Whole conversations in both columns, as UltraFeedback has them, with its scores and its own prompt under another name."""
    rows = []
    for row in chat(writer, count):
        scores = sorted(writer.random.random(2).round(2).tolist(), reverse=True)
        rows.append(
            {
                "chosen": row["prompt"] + row["chosen"],
                "rejected": row["prompt"] + row["rejected"],
                "score_chosen": scores[0],
                "score_rejected": scores[1],
            }
        )
    return rows


def tools(writer: Writer, count: int) -> list[Row]:
    """Conversations with tools, as a JSON text, and options of the template."""
    rows = []
    for i, row in enumerate(chat(writer, count)):
        names = writer.words[i : i + i % 3]
        described = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in names]
        rows.append({**row, "tools": json.dumps(described), "chat_template_kwargs": {"thinking": i % 2 == 0}})
    return rows


FORMATS: dict[str, Callable[[Writer, int], list[Row]]] = {
    f.__name__: f for f in (plain, rough, implicit, chat, implicit_chat, tools)
}


def write_texts(folder: Path, seed: int) -> None:
    """`<format>.jsonl` to train on and `<format>.eval.jsonl`, for every format."""
    folder.mkdir(parents=True)
    writer = Writer(seed)
    for name, make in FORMATS.items():
        for suffix, count in (("", PAIRS), (".eval", HELD_OUT)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in make(writer, count))
            (folder / f"{name}{suffix}.jsonl").write_text("".join(lines), encoding="utf-8")


END, START, PAD, BEGIN = "<|end|>", "<|start|>", "<|pad|>", "<|begin|>"

# Roles in words; a list of tools, and an empty thought that only the beginning of an answer gets.
TURNS = (
    "{%- if tools %}<|start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n{% endif %}"
    "{%- for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant\n{% if thinking is defined and not thinking %}[]\n{% endif %}{% endif %}"
)
# A beginning that the template writes, contents without their spaces, no word of the system.
BRACKETS = (
    "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}[Q] {{ message['content'] | trim }} [A]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}<|end|>"
    "{% else %}({{ message['content'] | trim }}) {% endif %}{% endfor %}"
)


def write_tokenizers(folder: Path, seed: int, size: int) -> None:
    """Three byte-level tokenizers of `size` tokens.

    `turns` adds nothing to a text. `bos` puts a token in front. `both` adds one at either end and has no padding token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    writer = Writer(seed)
    corpus = [writer.sentence(3, 20, odd=0.05) + ": " + writer.sentence(1, 20) for _ in range(400)]
    for name in ("turns", "bos", "both"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = [AddedToken(t, normalized=False) for t in (PAD, START, END, BEGIN)]
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus, trainer)
        if name != "turns":
            ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
            single = f"{BEGIN} $A" + (f" {END}" if name == "both" else "")
            tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
        into = folder / name
        into.mkdir(parents=True)
        tokenizer.save(str(into / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 4096}
        config |= {} if name == "turns" else {"bos_token": BEGIN}
        config |= {} if name == "both" else {"pad_token": PAD}
        (into / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (into / "chat_template.jinja").write_text(BRACKETS if name == "bos" else TURNS, encoding="utf-8")
