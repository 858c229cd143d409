"""The KL in detail: by position in an answer, over the answers, and along answers that the policy samples, as of the last evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_dpo.report import format as fmt
from jax_dpo.report.markup import Markup, el
from jax_dpo.report.records import Record
from jax_dpo.report.sections import section, table
from jax_dpo.report.summary import Run, eval_value, on_policy_text, part, said

_SIDES = ("chosen", "rejected")
FARTHEST = 3


def kl_detail(run: Run) -> Markup | None:
    """The last evaluation of each set, or the last training record where nothing was evaluated."""
    last = [run.evals_of(name)[-1] for name in run.set_names] or run.train[-1:]
    known = [r for r in last if part(r, "kl_profile")]
    if not known:
        return None
    first, *others = known
    more = [el("details", el("summary", _title(r)), *_tables(r)) for r in others]
    note = el("p", f"{_title(first)}, in nats. An answer's KL is the sum over its tokens.", cls="note")
    return section("kl-detail", "KL in detail", *_sampled(run), note, *_tables(first), *more)


def _title(record: Record) -> str:
    if record["kind"] == "train":
        return f"Training batches, logged at step {record['step']:,}"
    return f"Evaluation at step {record['step']:,}" + (f" on {fmt.plain(record['set'])}" if record.get("set") else "")


def _tables(record: Record) -> list[Markup]:
    profile = part(record, "kl_profile")
    rows = []
    for i, (first, last) in enumerate(profile.get("positions") or ()):
        row = [f"{first:,}" if first == last else f"{first:,} to {last:,}"]
        for side in _SIDES:
            found = part(profile, side)
            row += [fmt.number((found.get("kl_at") or ())[i]), fmt.whole((found.get("tokens_at") or ())[i])]
        rows.append(row)
    head = ("Position", *(f"{side.title()}{what}" for side in _SIDES for what in ("", ", tokens")))
    by_position = table("KL per token by position in the answer", head, rows, "numbers")
    measures = (("kl_divergence", "per token"), ("kl_sequence", "per answer"))
    spread = [
        [f"{who.capitalize()}, {unit}", *(fmt.number(values.get(q)) for q in ("mean", "p50", "p90", "max"))]
        for metric, unit in measures
        for who, values in _spread(record, profile, metric)
    ]
    over_answers = table("KL over the answers", ("", "Mean", "Median", "9 in 10 below", "Highest"), spread, "numbers")
    return [by_position, over_answers]


def _spread(record: Record, profile: Mapping[str, Any], metric: str) -> list[tuple[str, dict[str, Any]]]:
    def value(name: str) -> Any:
        return record.get(name) if record["kind"] == "train" else eval_value(record, name)

    both = {"mean": value(metric), **{q: value(f"{metric}/{q}") for q in ("p50", "p90", "max")}}
    sides = [(side, {"mean": value(f"{metric}/{side}"), **part(part(dict(profile), side), metric)}) for side in _SIDES]
    return [("all", both), *sides]


def _sampled(run: Run) -> list[Markup]:
    """The last evaluation that sampled answers in words, set by set; the curves have all of them."""
    last = [(run.evals_of(name)[-1], f" on {fmt.plain(name)}" if name else "") for name in run.set_names]
    parts: list[Markup] = []
    for record, where in last:
        if on_policy_text(record):
            parts.append(el("p", _in_words(record, where)))
            parts += _farthest(record)
    return parts


def _farthest(record: Record) -> list[Markup]:
    """The sampled answers along which the policy is farthest from the reference: what it has become, in its own words."""
    answers = [a for a in record.get("sampled") or () if isinstance(a, dict)]
    each = lambda a: (fmt.finite(a.get("kl")) or 0.0) / max(fmt.finite(a.get("tokens")) or 0, 1)  # noqa: E731
    first = sorted(answers, key=each, reverse=True)[:FARTHEST]
    if not first:
        return []
    rows = [[said(a.get("prompt")), said(a.get("answer")) or "(empty)", fmt.number(each(a))] for a in first]
    return [table("Sampled answers with the highest KL", ("Prompt", "Answer", "KL per token"), rows)]


def _in_words(last: Record, where: str) -> str:
    per_answer = fmt.number(eval_value(last, "kl_on_policy/sequence"))
    error = fmt.finite(eval_value(last, "kl_on_policy/sequence_se"))
    per_answer += f" ± {fmt.number(error)}" if error is not None else ""
    return (
        f"At step {last['step']:,}{where} the KL along answers that the policy samples is {on_policy_text(last)} nats per token, "
        f"{per_answer} nats per answer of {fmt.number(eval_value(last, 'kl_on_policy/length'), 1)} tokens (± one standard error over "
        "prompts)."
    )
