"""The known diseases of a DPO run, named from its records alone: each with its numbers and with what to change.

Every threshold stands beside its reason (`diseases.py`). They are set so that a healthy run has no finding, and so that none comes from one
log line: what is judged is a line through evaluations, a share of a window of log lines, or all of them. A finding is no gate: it fails
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from jax_dpo.report import diseases, summary
from jax_dpo.report.diseases import Case
from jax_dpo.report.records import Record
from jax_dpo.report.summary import Run

SERIOUS, WARNING, NOTE = "serious", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One disease: `text` says what was seen, with its numbers, `advice` what to change.

    `severity` is "serious" (the model should not be used so), "warning" (it may be worse than its numbers look) or "note".
    """

    name: str
    severity: str
    text: str
    advice: str

    def to_dict(self) -> dict[str, str]:
        """As the `verdict` record and verdict.json have it."""
        return asdict(self)


# In the order in which they are told: what makes the others hard to read comes first.
_LOOKED_FOR: tuple[tuple[str, str, Callable[[Case], tuple[str, str] | None]], ...] = (
    ("out-of-memory", SERIOUS, diseases.out_of_memory),
    ("kl-over-bound", SERIOUS, diseases.kl_over),
    ("kl-near-bound", NOTE, diseases.kl_near),
    ("loss-spikes", SERIOUS, diseases.loss_spikes),
    ("flat-margins", WARNING, diseases.flat_margins),
    ("over-fitting", WARNING, diseases.over_fitting),
    ("saturated-accuracy", WARNING, diseases.saturated),
    ("chosen-falls", WARNING, diseases.chosen_falls),
    ("length-exploitation", WARNING, diseases.length_exploitation),
    ("dropped-data", WARNING, diseases.dropped_data),
    ("always-clipped", NOTE, diseases.always_clipped),
)
NAMES = tuple(name for name, _, _ in _LOOKED_FOR)


def diagnose(records: Iterable[Record] | Run, set_name: str | None = None) -> list[Finding]:
    """What a run suffers from, most serious cause first; empty for a healthy one.

    Args:
      records: those of its run.jsonl, of the whole run or of as much as there is.
      set_name: the evaluation set to judge by; None: the verdict's, else the first that was evaluated.
    """
    run = records if isinstance(records, Run) else summary.summarise(records)
    case = Case(run, set_name or (run.verdict or {}).get("set") or next(iter(run.set_names), None))
    found = ((name, severity, look(case)) for name, severity, look in _LOOKED_FOR)
    return [Finding(name, severity, *words) for name, severity, words in found if words is not None]


def from_record(entry: dict[str, Any]) -> Finding:
    """The inverse of `Finding.to_dict`."""
    return Finding(*(str(entry.get(key) or "") for key in ("name", "severity", "text", "advice")))
