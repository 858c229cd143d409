"""A judge that never saw the training: VADER, word lists and a few rules, scores what was generated from -1 to 1.

Its lexicon was rated apart from the sentences that the demo trains on. The module is read out of its wheel and not
installed. Reference: Hutto & Gilbert 2014.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from jax_dpo.errors import UserError

MODULE = "vaderSentiment/vaderSentiment.py"
LEXICONS = ("vaderSentiment/vader_lexicon.txt", "vaderSentiment/emoji_utf8_lexicon.txt")
POSITIVE = 0.05
NEGATIVE = -0.05

Score = Callable[[str], float]


def load_judge(wheel: Path) -> Score:
    """Text -> compound score in [-1, 1], by the module in `wheel`. Raises UserError where it is not in there."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch, [MODULE, *LEXICONS])
        except (KeyError, zipfile.BadZipFile) as problem:
            raise UserError("demo-judge", f"{wheel} does not hold {MODULE}: {problem}") from None
        spec = importlib.util.spec_from_file_location("vader", Path(scratch) / MODULE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        analyzer = module.SentimentIntensityAnalyzer()  # reads its lexicons now, so that the files may go
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def last_samples(records: Path) -> list[dict[str, str]]:
    """The samples that were written last into a run.jsonl: dicts with prompt, reference and policy. May be empty."""
    found: list[dict[str, str]] = []
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "samples":
            found = record["samples"]
    return found


def table(samples: list[dict[str, str]], score: Score) -> str:
    """Reference and policy side by side: mean score, and how many answers are positive and negative."""
    lines = [f"  {'VADER, -1 to 1':<18}{'mean':>7}{'positive':>11}{'negative':>11}"]
    for side in ("reference", "policy"):
        scores = [score(sample[side]) for sample in samples]
        positive = f"{sum(value > POSITIVE for value in scores)} of {len(scores)}"
        negative = f"{sum(value < NEGATIVE for value in scores)} of {len(scores)}"
        lines.append(f"  {side:<18}{sum(scores) / len(scores):>+7.2f}{positive:>11}{negative:>11}")
    return "\n".join(lines)
