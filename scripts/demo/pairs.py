"""Preference pairs from film-review sentences that people have rated, as JSON lines in TRL's conversational format.

Two sentences about one topic make a pair. The stock model gushes about every film, so the critical sentence is the
chosen one: the change is easy to see. No sentence is used twice, so held-out pairs share topics with the training
pairs, never a sentence. Sentences: Hutto & Gilbert 2014 (each rated by twenty or more people from -4 to +4), first
collected by Pang & Lee.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jax_dpo.errors import UserError

SEED = 0
HELD_OUT = 200
EVALUATED = 96
WORDS = range(6, 33)
POSITIVE = 1.0
NEGATIVE = -1.0

# A topic's name goes into the prompt; a sentence is about it where the pattern occurs.
TOPICS = {
    "the story": r"stor(?:y|ies|yline|ytelling)|narratives?|tales?",
    "the characters": r"characters?",
    "the plot": r"plot(?:s|ted|ting)?",
    "the director": r"directors?|filmmakers?|directed|directs",
    "the script": r"scripts?|screenplays?|scripted|screenwriters?",
    "the performances": r"performances?|performers?",
    "the cast": r"casts?|casting|ensemble",
    "the humor": r"humou?r|humorous|jokes?|funny|laughs?|laughter",
    "the comedy": r"comed(?:y|ies|ic)|comical?",
    "the action": r"action",
    "the drama": r"dramas?|dramatic",
    "the love story": r"love (?:story|stories|affair)|in love|romances?|romantic|lovers?",
    "the dialogue": r"dialog(?:ue)?s?",
    "the acting": r"acting|actors?|actress(?:es)?|acted",
    "the music": r"music|musical|songs?|soundtrack|score",
    "the ending": r"ending|endings|ends|finale|conclusion|climax",
    "the audience": r"audiences?|viewers?|moviegoers?",
    "the thriller": r"thrillers?|thrills?|suspense|suspenseful",
    "the horror": r"horror|scary|scares?",
    "the documentary": r"documentar(?:y|ies)",
    "the style": r"styles?|stylish|stylized",
    "the scenes": r"scenes?|sequences?",
    "children and family": r"kids?|child(?:ren)?|famil(?:y|ies)",
    "the look of the film": r"visuals?|visually|cinematography|images?|imagery|photography|photographed",
    "the length": r"minutes|hours?|overlong|length",
    "the hero": r"hero(?:es|ine)?|heroic|protagonists?",
    "the war": r"wars?|battles?|soldiers?",
    "the ideas": r"ideas?|themes?|concepts?|messages?|premise",
    "the world it shows": r"worlds?",
    "the special effects": r"effects|cgi|computer-generated|animation|animated",
    "the film": r"films?",
    "the movie": r"movies?|flicks?",
    "the picture": r"pictures?",
}


@dataclass(frozen=True)
class Sentence:
    text: str
    rating: float


@dataclass(frozen=True)
class Match:
    """A pair before it is a row: one topic, a sentence that rates the film high and one that rates it low."""

    topic: str
    praise: Sentence
    criticism: Sentence


def write_pairs(ratings: Path, folder: Path) -> dict[str, int]:
    """Writes train.jsonl, test.jsonl (evaluated during the run) and held_out.jsonl (more held-out pairs) into `folder`.

    The same ratings give the same bytes. Returns counts: usable sentences, and rows by file name. Raises UserError
    where `ratings` is not a ratings file.
    """
    sentences = usable(read_ratings(ratings))
    rows = [row(match) for match in match_pairs(sentences)]
    parts = {
        "test.jsonl": rows[:EVALUATED],
        "held_out.jsonl": rows[EVALUATED:HELD_OUT],
        "train.jsonl": rows[HELD_OUT:],
    }
    if not parts["train.jsonl"]:
        raise UserError("demo-ratings-few", f"{ratings} gives {len(rows)} pairs, too few to hold {HELD_OUT} out")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        _write_lines(folder / name, part)
    return {"sentences": len(sentences)} | {name: len(part) for name, part in parts.items()}


def read_ratings(path: Path) -> list[Sentence]:
    """The rated sentences of a file of lines `id, mean rating, text` (tabs). Raises UserError at any other line."""
    sentences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        try:
            sentences.append(Sentence(fields[2], float(fields[1])))
        except (IndexError, ValueError):
            raise UserError(
                "demo-ratings-line", f"{path}, line {number}: expected 'id<TAB>rating<TAB>text', found {line[:80]!r}"
            ) from None
    return sentences


def usable(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Whole sentences of 6 to 32 words without quotations, each text once (in any case), white space collapsed."""
    kept: dict[str, Sentence] = {}
    for sentence in sentences:
        text = " ".join(sentence.text.split()).replace("''", '"')
        whole = text[:1].isupper() and text.endswith((".", "!", "?")) and '"' not in text
        if whole and len(text.split()) in WORDS:
            kept.setdefault(text.lower(), Sentence(text, sentence.rating))
    return list(kept.values())


def match_pairs(sentences: list[Sentence]) -> list[Match]:
    """Pairs of a praising and a criticising sentence on one topic, the rarest topic served first, in a mixed order.

    The texts alone decide it: neither the order of the file nor the version of Python matters.
    """
    patterns = {topic: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for topic, words in TOPICS.items()}
    about = {topic: [s for s in sentences if pattern.search(s.text)] for topic, pattern in patterns.items()}
    used: set[str] = set()
    matches = []
    for topic in sorted(TOPICS, key=lambda topic: (len(about[topic]), topic)):
        free = _shuffled([s for s in about[topic] if s.text not in used], topic)
        praising = [s for s in free if s.rating >= POSITIVE]
        criticising = [s for s in free if s.rating <= NEGATIVE]
        for praise, criticism in zip(praising, criticising, strict=False):
            used.update((praise.text, criticism.text))
            matches.append(Match(topic, praise, criticism))
    return sorted(matches, key=lambda match: _rank("pairs", match.praise.text))


def row(match: Match) -> dict[str, object]:
    """The pair as TRL's conversational format has it, with the scores that its gap filter and its curriculum read."""
    return {
        "prompt": [{"role": "user", "content": f"Write one sentence from a film review. Talk about {match.topic}."}],
        "chosen": [{"role": "assistant", "content": match.criticism.text}],
        "rejected": [{"role": "assistant", "content": match.praise.text}],
        "score_chosen": -match.criticism.rating,
        "score_rejected": -match.praise.rating,
    }


def _shuffled(sentences: list[Sentence], salt: str) -> list[Sentence]:
    return sorted(sentences, key=lambda sentence: _rank(salt, sentence.text))


def _rank(salt: str, text: str) -> bytes:
    # A hash instead of `random`: the same order on every version of Python.
    return hashlib.sha256(f"{SEED}\0{salt}\0{text}".encode()).digest()


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return  # an untouched file keeps the tokens that were cached for it
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
