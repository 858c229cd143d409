"""How each disease of a run shows in its records: a function a disease, (what was seen, what to change) or None.

`diagnosis.py` lists them with their names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from jax_dpo.report import format as fmt
from jax_dpo.report.records import Record
from jax_dpo.report.summary import RUNNING, Run, eval_value, part
from jax_dpo.report.trend import Trend, fit

Words = tuple[str, str]
Points = list[tuple[float, float]]

NEAR = 0.9
"""Share of the bound from which on a KL that nothing holds is near it: what is left is less than one evaluation's scatter in most runs."""
LEAST_GAIN = 0.02
"""Margin gained below which it is flat: sigmoid's loss at margin 0.02 is 1.4 % below ln 2, what one batch differs from the next by."""
CLEAR = 2.0
"""Standard errors from which on a slope has a sign (95 %)."""
WINDOW = 10
"""Log lines before one that say what is usual there."""
FEW = 0.1
"""Share of log lines up to which a high loss may be the batch's."""
SIX_SIGMA = 6 * 1.4826
"""Median absolute deviations that are six standard deviations of a normal scatter: none of ten thousand log lines by chance."""
FALL_SHARE = 0.02
"""Share of its log-probability that a chosen answer loses: a perplexity of 4 per token becomes 4.11."""
FALL_NATS = 1.0
"""... and at least a factor e a whole answer, below which nothing that is sampled changes."""
LENGTH_SHARE = 0.5
"""Share of the margin that lengths explain: half and more, and the policy has learned length before anything else."""
LENGTH_CLEAR = 3.0
"""Standard errors of that line's slope: one held-out set is looked at once, so 99.7 %."""
ALL_LONGER, MUCH_LONGER = 0.95, 0.5
"""Share of pairs whose chosen answer is the longer one, and by how much of the rejected one's length in the mean, from which on "write
more" is as good a reading of the pairs as any other."""
ALL_RIGHT, LOSS_LEFT = 0.995, 0.1
"""Accuracy and share of the first loss from which on training pairs teach nothing more: sigmoid's gradient is then below a tenth of its
first value."""
LEARNED = 0.7
"""Share of the first loss that a training loss has fallen to where the pairs have been learned: sigmoid's margin is then 0.5 and more."""
LEAST_RISE = 0.03
"""Share of the first evaluation loss by which it has risen again (0.02 nats of ln 2)."""
LEAST_LOGS = 5
"""Log lines below which nothing is said of every one of them."""
FAR_CLIPPED = 30.0
"""Times max_grad_norm that the usual norm is. DPO's loss sums over the tokens of an answer: with a max_grad_norm of 1 and a beta of 0.1
norms of 5 to 20 are those of a healthy run, of which Adam, which divides by the gradient's size, takes no notice."""
DROPPED = 0.1
"""Share of rows: from a tenth on the data that are trained on are another set than the one that was given."""


@dataclass(frozen=True)
class Case:
    """A run, and the evaluation set to look at (None is the only, unnamed one)."""

    run: Run
    set: str | None

    @cached_property
    def options(self) -> dict[str, Any]:
        return part(self.run.start, "options")

    @cached_property
    def evals(self) -> list[Record]:
        return self.run.evals_of(self.set)

    def held_out(self, metric: str) -> Points:
        """(step, value) of the evaluations that have it, finite ones."""
        return [(s, y) for s, y in self.run.eval_points(metric, self.set) if y is not None]

    def training(self, metric: str) -> Points:
        return [(s, y) for s, y in self.run.train_points(metric) if y is not None]

    @cached_property
    def last_part(self) -> float:
        """The step at which the last quarter of the log lines begins; of at least three."""
        steps = [r["step"] for r in self.run.train]
        return steps[-max(3, len(steps) // 4)] if len(steps) >= 3 else math.inf

    @cached_property
    def moving_reference(self) -> bool:
        return bool(self.options.get("sync_ref_model"))

    @cached_property
    def held(self) -> bool:
        """Whether something watches the KL and acts."""
        o = self.options
        controlled = o.get("kl_controller") not in (None, "none") or o.get("adaptive_beta") or o.get("kl_trust_region")
        return bool(controlled or o.get("kl_actions"))

    def change(self, option: str, factor: float) -> str:
        """An option with the value to try: "learning_rate (now 1e-6; try 5e-7)"."""
        now = fmt.finite(self.options.get(option))
        return option if not now else f"{option} (now {fmt.power(now)}; try {fmt.power(float(f'{now * factor:.2g}'))})"


def out_of_memory(case: Case) -> Words | None:
    end = case.run.end or {}
    if end.get("error") != "out-of-memory":
        return None
    advice = str(end.get("advice") or "").strip()
    usual = (
        "A smaller micro-batch: micro_batch_tokens, or per_device_train_batch_size halved with gradient_accumulation_steps doubled; "
        "shorter sequences (max_length); gradient_checkpointing true."
    )
    return str(end.get("message") or "Out of memory.").rstrip(":"), advice or usual


def _kl(case: Case) -> tuple[Points, str]:
    """KL over the steps and what it was measured on: held-out pairs, or training batches where nothing was evaluated."""
    points = case.held_out("kl_divergence")
    return (
        (points, "of the last evaluation")
        if points
        else (case.training("kl_divergence"), "of the last training batches")
    )


def _speed(points: Points) -> Trend | None:
    """The line through the last five: the KL rises fast at first and slower later."""
    return fit(points[-5:])


def kl_over(case: Case) -> Words | None:
    bound, (points, where) = case.run.target_kl, _kl(case)
    if bound is None or not points or points[-1][1] <= bound:
        return None
    step, kl = points[-1]
    text = (
        f"The KL {where} (step {step:,}) is {fmt.number(kl)} nats per token, {kl / bound:.2f} times its bound {bound:g}"
    )
    first_over = next(s for s, y in points if y > bound)
    before = [s for s, _ in points if s < first_over]
    text += f"; it passed the bound between steps {before[-1]:,} and {first_over:,}" if before else ""
    line = _speed(points)
    text += f". Its speed at the end: {line.text}." if line else "."
    advice = f"Lower {case.change('learning_rate', 0.5)}, or raise {case.change('beta', 1.5)}"
    return text, advice + (
        "." if case.held else "; kl_actions, kl_controller or kl_trust_region hold the bound on the way."
    )


def kl_near(case: Case) -> Words | None:
    bound, (points, where) = case.run.target_kl, _kl(case)
    if bound is None or case.held or len(points) < 2 or points[-1][1] > bound:
        return None
    step, kl = points[-1]
    line = _speed(points)
    if line is None or line.slope <= CLEAR * (line.slope_error or 0.0):
        return None
    left = (bound - kl) / line.slope
    ahead = (case.run.total or step) - step if case.run.state == RUNNING else 0
    if kl < NEAR * bound and not 0 < left < ahead:
        return None
    text = (
        f"The KL {where} (step {step:,}) is {fmt.number(kl)}, {100 * kl / bound:.0f} % of its bound {bound:g}, and rises "
        f"({line.text}): at this speed it passes the bound in about {_steps(max(1, round(left)))}."
    )
    return (
        text,
        f"For a longer run: kl_actions, kl_controller or kl_trust_region hold it; or lower {case.change('learning_rate', 0.5)}.",
    )


def loss_spikes(case: Case) -> Words | None:
    points, skipped = case.training("loss"), [r for r in case.run.nonfinite if r.get("what") != "evaluation"]
    leaps = _leaps(points)
    late = [y for s, y in points if s >= case.last_part]
    first = points[0][1] if points else 0.0
    diverged = len(points) >= LEAST_LOGS and median(late) > first + 0.5 * abs(first)
    if not leaps and not diverged and not skipped:
        return None
    said = []
    if leaps:
        step, loss, usual = max(leaps, key=lambda leap: leap[1])
        shown = ", ".join(f"{s:,}" for s, _, _ in leaps[:5]) + (" and more" if len(leaps) > 5 else "")
        said.append(
            f"The training loss leaps at {len(leaps)} of {len(points)} log lines (step {shown}), at worst to "
            f"{fmt.number(loss)} at step {step:,} from a usual {fmt.number(usual)}; it began at {fmt.number(first)}"
        )
        norms = dict(case.training("grad_norm"))
        if step in norms:
            usual = median(norms.values())
            said.append(
                f"The gradient's norm was {fmt.number(norms[step], 2)} there, its median is {fmt.number(usual, 2)}"
            )
    if diverged:
        said.append(f"The loss ends at {fmt.number(median(late))}, above its first value {fmt.number(first)}")
    if skipped:
        said.append(f"{_steps(len(skipped))} not finite, left out")
    advice = (
        f"Lower {case.change('learning_rate', 0.5)}; more warmup_steps, a larger batch or a smaller "
        f"{case.change('max_grad_norm', 0.5)} help as well."
    )
    return ". ".join(said) + ".", advice


def _leaps(points: Points) -> list[tuple[float, float, float]]:
    """(step, loss, the usual loss before it) of log lines that leap.

    Two models that are equal have the first loss: as much as there is to learn. A leap is a line above its neighbours before by more than
    that and by more than six standard deviations of them. Where a tenth of all lines lie above twice the first loss (one pair alone
    may do that), each of them is one: of a loss that leaps all the time nothing is usual.
    """
    found = []
    first = points[0][1] if points else 0.0
    high = {s for s, y in points if y > first + abs(first)}
    often = len(high) >= max(2, FEW * len(points))
    for i, (step, loss) in enumerate(points):
        before = [y for _, y in points[max(0, i - WINDOW) : i]] or [loss]
        if loss - min(before) <= abs(first) and not (often and step in high):
            continue  # no more than that above any of them
        usual = median(before)
        scatter = median(abs(y - usual) for y in before)
        sudden = len(before) >= LEAST_LOGS and loss - usual > max(abs(first), SIX_SIGMA * scatter)
        if sudden or (often and step in high):
            found.append((step, loss, usual))
    return found


def flat_margins(case: Case) -> Words | None:
    """Where at least half of the run is done: at its beginning every margin is flat."""
    run, points = case.run, case.held_out("rewards/margins")
    source = "held-out"
    if len(points) < 2:
        points, source = case.training("rewards/margins"), "training"
    if case.moving_reference or len(points) < 2 or (run.state == RUNNING and run.step < 0.5 * (run.total or 0)):
        return None
    (_, first), (step, last) = points[0], points[-1]
    line = fit(points)
    end = last if line is None or line.count < 3 else max(last, line.at(step))
    if end - first >= LEAST_GAIN:
        return None
    text = f"The {source} margin has hardly risen: {fmt.signed(first)} at step {points[0][0]:,}, {fmt.signed(last)} at step {step:,}"
    text += f" (trend {line.text})" if line else ""
    kl, bound = _kl(case)[0], run.target_kl
    rates = [y for _, y in case.training("learning_rate")]
    if rates and not any(rates):
        return text + ".", "Every logged step had a learning rate of 0: set learning_rate, or fewer warmup_steps."
    if kl and bound is not None:
        text += f"; the KL is {fmt.number(kl[-1][1])} of {bound:g}"
        if kl[-1][1] > 0.5 * bound:
            return text + ": the policy moves, and not where the pairs point.", (
                "Check the quality of the data: whether the answers of a pair differ in what is preferred, whether labels contradict each "
                "other, whether the held-out pairs are of the same kind."
            )
    return text + ".", (
        f"A higher {case.change('learning_rate', 2)} or a lower {case.change('beta', 0.5)} moves the policy further; check the quality "
        "of the data."
    )


def over_fitting(case: Case) -> Words | None:
    points, losses = case.held_out("loss"), case.training("loss")
    if case.moving_reference or len(points) < 4 or len(losses) < LEAST_LOGS:
        return None
    first, last = points[0][1], points[-1][1]
    best = min(range(len(points)), key=lambda i: points[i][1])
    from_step, low = points[best]
    line, train = fit(points[best:]), fit([p for p in losses if p[0] >= from_step])
    late = median(y for s, y in losses if s >= case.last_part)
    learned = late < LEARNED * losses[0][1]
    falls = learned or (train is not None and train.slope < -CLEAR * (train.slope_error or 0.0))
    rises = last - low > LEAST_RISE * abs(first) and line is not None and line.count >= 3
    rises = rises and line is not None and line.slope > CLEAR * (line.slope_error or 0.0)
    if rises and falls and line is not None:
        when = f"at step {from_step:,}" if from_step else "before the first step"
        text = f"The evaluation loss was lowest {when} ({fmt.number(low)}) and has risen since to {fmt.number(last)} ({line.text})"
    elif learned and first > 0 and last > (1 - LEAST_RISE) * first:
        text = f"The evaluation loss, {fmt.number(last)}, is no better than its first value ({fmt.number(first)})"
    else:
        return None
    epochs = fmt.finite(part(case.run.start, "plan").get("epochs"))
    shorter = (
        f" (it was best at step {from_step:,}" + (f" of {epochs:.1f} epochs)" if epochs else ")") if from_step else ""
    )
    return (
        f"{text}, while the training loss fell from {fmt.number(losses[0][1])} to {fmt.number(late)}: the pairs are learned by heart."
    ), (
        f"Train shorter{shorter}, on more pairs, with a lower {case.change('learning_rate', 0.5)} or a higher "
        f"{case.change('beta', 1.5)}. best/ holds the best checkpoint within the bound."
    )


def saturated(case: Case) -> Words | None:
    accuracies, losses = case.training("rewards/accuracies"), case.training("loss")
    right = [y for s, y in accuracies if s >= case.last_part]
    late = [y for s, y in losses if s >= case.last_part]
    if not right or not late or losses[0][1] <= 0:
        return None
    share, loss, first = sum(right) / len(right), sum(late) / len(late), losses[0][1]
    if share < ALL_RIGHT or loss > LOSS_LEFT * first:
        return None
    wrong = [s for s, y in accuracies if y < ALL_RIGHT]
    since = next(s for s, _ in accuracies if not wrong or s > wrong[-1] or s >= case.last_part)
    text = (
        f"The training accuracy is {fmt.percent(share)} since step {since:,}, and the training loss {fmt.number(loss)}, "
        f"{100 * loss / first:.1f} % of its first value: these pairs teach nothing more, and further steps only move the policy away."
    )
    return text, (
        f"Train fewer steps or epochs, with a higher {case.change('beta', 2)} or a lower {case.change('learning_rate', 0.5)}; "
        "give pairs that are harder to tell apart."
    )


def chosen_falls(case: Case) -> Words | None:
    points, side = case.held_out("logps/chosen"), "held-out"
    if len(points) >= 2:
        fall, before, trend = points[0][1] - points[-1][1], abs(points[0][1]), fit(points)
        other = case.held_out("logps/rejected")
        rejected = other[-1][1] - other[0][1] if len(other) >= 2 else None
    else:
        # Training batches are other answers each time: what compares is the log-ratio to the reference, the reward by beta.
        points, side = case.training("rewards/chosen"), "training"
        beta, logps = fmt.finite(case.options.get("beta")), case.training("logps/chosen")
        if not beta or not logps or len(points) < LEAST_LOGS:
            return None
        late = [y for s, y in points if s >= case.last_part]
        fall, before, trend = -sum(late) / len(late) / beta, abs(logps[0][1]), fit(points)
        ends = [y for s, y in case.training("rewards/rejected") if s >= case.last_part]
        rejected = sum(ends) / len(ends) / beta if ends else None
    if fall <= FALL_NATS or fall <= FALL_SHARE * before or trend is None or trend.slope >= 0:
        return None
    both = (
        ""
        if rejected is None
        else f"; that of the rejected ones {'fell' if rejected < 0 else 'rose'} by {abs(rejected):.3g}"
    )
    text = (
        f"The log-probability of the {side} chosen answers has fallen by {fall:.3g} nats an answer "
        f"({100 * fall / max(before, 1e-9):.0f} %) by step {points[-1][0]:,}{both}: the margin grows while the good "
        "answers become less likely too."
    )
    return text, (
        "Add the chosen answers' own likelihood: loss_type sigmoid and sft with loss_weights 1.0 and 0.5 or more. A lower "
        f"{case.change('learning_rate', 0.5)} or a higher {case.change('beta', 2)} holds it back as well."
    )


def length_exploitation(case: Case) -> Words | None:
    last = case.evals[-1] if case.evals else None
    names = ("rewards/margins", "length/chosen", "length/rejected", "length/chosen_longer")
    margin, chosen, rejected, longer = (fmt.finite(eval_value(last, name)) for name in names)
    pairs = case.run.pairs_of(case.set)
    if margin is None or chosen is None or rejected is None or longer is None or not pairs or margin < LEAST_GAIN:
        return None
    more = chosen - rejected
    slope, r = (fmt.finite(eval_value(last, f"length/margin_{name}")) for name in ("slope", "correlation"))
    where = f"Chosen answers are longer in {fmt.percent(longer)} of the {pairs:,} held-out pairs, by {more:.1f} tokens in the mean"
    advice = (
        "Balance the lengths in the data; loss_type sigmoid_norm divides by them, ld_alpha below 1 lets the tokens beyond the shorter "
        "answer count less. Look at the lengths of sampled answers before the model is used."
    )
    if slope is not None and r is not None and pairs > 3:
        error = abs(slope) * math.sqrt(max(1 - r * r, 0.0) / (pairs - 2)) / max(abs(r), 1e-12)
        share = slope * more / margin
        if slope > LENGTH_CLEAR * error and share >= LENGTH_SHARE:
            return (
                f"{100 * share:.0f} % of the margin goes with length: it grows by {slope:.3g} ± {error:.2g} for each token by which the "
                f"chosen answer is longer (correlation {r:.2f}). Between answers of one length it would be "
                f"{fmt.signed(margin - slope * more)}, not {fmt.signed(margin)}. {where}."
            ), advice
        if (slope + CLEAR * error) * more / margin < LENGTH_SHARE:
            return None  # lengths differ enough to see that the margin is not theirs
    if longer >= ALL_LONGER and more >= MUCH_LONGER * rejected:
        return f"{where}: a preference for length cannot be told from one for quality in these pairs.", advice
    return None


def dropped_data(case: Case) -> Words | None:
    data = part(case.run.start, "data")
    held_out = {f"held-out ({name})": facts for name, facts in part(data, "eval").items() if isinstance(facts, dict)}
    said, reasons = [], set()
    for name, facts in {"training": part(data, "train"), **held_out}.items():
        rows, cut = fmt.finite(facts.get("rows")) or 0, fmt.finite(facts.get("cut")) or 0
        dropped = sorted(((n, why) for why, n in part(facts, "dropped").items() if n), reverse=True)
        gone = sum(n for n, _ in dropped)
        if rows and gone >= DROPPED * rows:
            by = ", ".join(f"{fmt.whole(n)} {why} ({fmt.percent(n / rows)})" for n, why in dropped)
            said.append(f"{fmt.percent(gone / rows)} of the {name} rows were left out: {by}")
            reasons |= {why for _, why in dropped}
        if rows and cut >= DROPPED * rows:
            said.append(f"{fmt.percent(cut / rows)} of the {name} pairs were cut to fit max_length")
            reasons.add("cut")
    if not said:
        return None
    known = {
        "small_gap": "min_score_gap says how far scores must differ",
        "too_long": "a higher max_length keeps long prompts",
        "cut": "a higher max_length cuts less",
        "duplicate": "rows without duplicate in drop_rows keep them",
    }
    first = "dropped.jsonl names the rows and why" if reasons - {"cut"} else ""
    advice = "; ".join([*filter(None, [first]), *(text for why, text in known.items() if why in reasons)])
    return ". ".join(said) + ".", f"{advice[0].upper()}{advice[1:]}."


def always_clipped(case: Case) -> Words | None:
    norms, most = [y for _, y in case.training("grad_norm")], fmt.finite(case.options.get("max_grad_norm"))
    if not most or len(norms) < LEAST_LOGS or min(norms) <= most:
        return None
    follows = case.options.get("optim") == "sgd"
    if not follows and median(norms) < FAR_CLIPPED * most:
        return None
    usual, low, high = (fmt.number(x, 2) for x in (median(norms), min(norms), max(norms)))
    text = (
        f"The gradient was clipped in each of the {len(norms):,} logged steps: its norm is {low} to {high} (median {usual}) against "
        f"max_grad_norm {most:g}. So all steps have a gradient of one length, and none that is unusual is tamed more than the others."
    )
    what = (
        "The steps of sgd are as long as the gradient, so this sets their length"
        if follows
        else "Other optimizers than sgd divide by the gradient's own size, so the learning rate still says how long the steps are"
    )
    rounded = fmt.power(float(f"{2 * median(norms):.1g}"))
    return (
        text,
        f"{what}. To clip only what is unusual: max_grad_norm {rounded}; a larger batch or a lower beta makes gradients smaller.",
    )


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"
