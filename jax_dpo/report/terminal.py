"""What `jax-dpo train` shows: the plan, a live line while it trains, evaluations, actions, samples, the verdict.

Where the output is no terminal, everything is plain lines, one a log record, without control codes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jax_dpo.report import format as fmt
from jax_dpo.report import summary
from jax_dpo.report.live_line import LiveLine
from jax_dpo.report.records import Record
from jax_dpo.report.summary import eval_value, part

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

# Records that go on the table of evaluations, or leave it as it is.
_IN_TABLE = ("train", "eval", "checkpoint", "kl_action")
_SEVERITIES = {"serious": "bold red", "warning": "yellow"}
_MARKS = {"passed": "green", "failed": "bold red"}


class Display(Protocol):
    """What the loop tells whoever watches."""

    def write(self, record: Record) -> None: ...

    def compiling(self, what: str, about_seconds: float | None = None) -> None: ...

    def compiled(self, seconds: float) -> None: ...

    def busy(self, what: str) -> None: ...

    def progress(self, step: int, total: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Quiet:
    """Shows nothing; for use from Python."""

    def write(self, record: Record) -> None:
        pass

    def compiling(self, what: str, about_seconds: float | None = None) -> None:
        pass

    def compiled(self, seconds: float) -> None:
        pass

    def busy(self, what: str) -> None:
        pass

    def progress(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Terminal:
    """Shows a run on a console. `history` are the records of its earlier part, where it was resumed.

    `live` says whether lines may be redrawn; by default where the console is a terminal. A terminal that goes away
    (a closed pipe) never ends a run: nothing more is shown.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        live: bool | None = None,
        history: Sequence[Record] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        # FORCE_COLOR must not put control codes into a file, so the stream itself is asked.
        tty = bool(getattr(sys.stdout, "isatty", lambda: False)())
        self.console = console or Console(force_terminal=None if tty else False)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal if live is None else live
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._clock = clock
        self._records: list[Record] = [r for r in history if r.get("kind") != "train"]
        self._line = LiveLine(clock)
        self._screen: Live | None = None
        self._rows = 0  # of the table of evaluations, since its head was shown
        self._gone = False

    # What the loop says

    def write(self, record: Record) -> None:
        """Shows one record."""
        kind = record.get("kind")
        if kind != "train":  # there may be a million of them, and nothing here looks back at one
            self._records.append(record)
        show = getattr(self, f"_show_{kind}", None)
        if kind not in _IN_TABLE:
            self._rows = 0
        if show is not None:
            show(record)
        elif kind == "resume":
            self._say(f"going on from {record.get('from')}, after step {record.get('step')}")
            for warning in record.get("warnings") or ():
                self._say(f"warning: {warning}", style="yellow")

    def compiling(self, what: str, about_seconds: float | None = None) -> None:
        """Says that `what` is being compiled, and for about how many seconds that will last."""
        text = f"compiling {what}" + (f", {fmt.about(about_seconds)}" if about_seconds else "")
        self._line.doing(text)
        if self.live:
            self._refresh()
        else:
            self._say(text)

    def compiled(self, seconds: float) -> None:
        self._line.doing(None)
        self._say(f"compiled in {fmt.duration(seconds)}", style="dim")

    def busy(self, what: str) -> None:
        """Names on the live line what is done between steps, such as "evaluating"; ends with the next one."""
        self._line.doing(what)
        self._refresh()

    def progress(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Moves the live line to `step`; metrics that are not there keep their last value."""
        self._line.doing(None)
        self._line.move(step, total, metrics)
        self._refresh()

    def close(self) -> None:
        """Ends the live line, and says last where everything lies and how it went."""
        self._end_line()
        run = summary.summarise(self._records)
        if run.verdict is not None:
            self._say("")
            self._facts("Where everything lies", self._places(run))
            self._say(run.headline, style="bold green" if run.verdict.get("passed") else "bold red")
        elif run.end is not None and run.state == summary.STOPPED:
            saved = f"; saved as {run.checkpoints[-1].get('path')}" if run.checkpoints else ""
            where = f"step {run.end.get('step')}" + (f" of {run.total}" if run.total else "")
            self._say(
                f"stopped by a signal at {where}{saved}; run the same command again to go on; exit 75",
                style="bold yellow",
            )
        self._records.clear()

    # What a record looks like

    def _show_start(self, record: Record) -> None:
        plan, changed = part(record, "plan"), part(record, "changed")
        rows = [
            ("model", summary.model_sentence(record)),
            ("trained", summary.trained_sentence(record)),
            ("reference", str(record.get("reference") or fmt.NONE)),
            *summary.data_sentences(record),
            *(("order", text) for text in summary.order_sentences(record)),
            ("plan", summary.plan_sentence(record)),
        ]
        if fmt.finite(plan.get("seconds")) is not None:
            rows.append(("expected", fmt.about(plan["seconds"])))
        if changed:
            rows.append(("options", ", ".join(f"{name} {fmt.option(value)}" for name, value in changed.items())))
        version = record.get("version") or ""
        self._facts(f"jax_dpo {version} on {summary.device_sentence(record)}", rows)
        for warning in plan.get("warnings") or ():
            self._say(f"warning: {warning}", style="yellow")

    def _show_train(self, record: Record) -> None:
        total = self._line.total or summary.summarise(self._records).total or record["step"]
        self._line.move(record["step"], total, record)
        if not self.live:
            self._say("step " + "  ".join(text for _, text in self._line.pieces()))
        self._refresh()

    def _show_eval(self, record: Record) -> None:
        self._line.doing(None)
        name, bound = record.get("set"), self._target_kl()
        kl = fmt.finite(eval_value(record, "kl_divergence"))
        over = kl is not None and bound is not None and kl > bound
        values = [
            ("loss", fmt.number(eval_value(record, "loss"))),
            ("margin", fmt.signed(eval_value(record, "rewards/margins"))),
            ("accuracy", summary.accuracy_text(record)),
            ("KL", fmt.number(kl) + (f" > {bound:g}" if over else "")),
        ] + [("on policy", text) for text in [summary.on_policy_text(record)] if text]
        if not self.live:
            label = f"evaluation {name}" if name else "evaluation"
            self._say(f"step {record['step']}  {label}  " + "  ".join(f"{k} {v}" for k, v in values))
            return
        widths = (9, 10, 19, 16, 18)
        head = f"{'step':>8}  {'set':<14}" if name else f"{'step':>8}"
        cells = f"{record['step']:>8}  {str(name)[:14]:<14}" if name else f"{record['step']:>8}"
        if self._rows % 20 == 0:
            self._say("held-out pairs", style="bold")
            self._say(head + "".join(f"{k:>{w}}" for (k, _), w in zip(values, widths)), style="dim")
        self._rows += 1
        self._say(cells + "".join(f"{v:>{w}}" for (_, v), w in zip(values, widths)), style="red" if over else "")

    def _show_nonfinite(self, record: Record) -> None:
        self._line.doing(None)
        self._say(summary.nonfinite_text(record), style="red")

    def _show_kl_action(self, record: Record) -> None:
        reason = f" ({record['reason']})" if record.get("reason") else ""
        self._say(f"step {record.get('step')}  KL control: {summary.action_text(record)}{reason}", style="yellow")

    def _show_checkpoint(self, record: Record) -> None:
        self._line.doing(None)
        text = f"saved {record.get('path')}"
        if "score" in record:
            score = record["score"]
            text += ", no score: KL is over its bound" if score is None else f", score {fmt.signed(score)}"
        text += ", the best so far" if record.get("best") else ""
        self._say(f"{'':10}{text}" if self._rows else f"step {record.get('step')}  {text}", style="dim")

    def _show_samples(self, record: Record) -> None:
        self._line.doing(None)
        self._say("")
        self._say(f"{record.get('title') or 'Samples'} (step {record.get('step')})", style="dim")
        for sample in record.get("samples") or []:
            self._show_table(summary.said(sample.get("prompt")), self._side_by_side(sample))

    def _show_verdict(self, record: Record) -> None:
        self._end_line()
        run = summary.summarise(self._records)
        for name in run.set_names:
            found = run.evals_of(name)
            if len(found) > 1:
                title = f"Held-out pairs{f' ({name})' if name else ''}"
                self._show_table(title, self._before_after(found[0], found[-1]))
        table = self._table("gate", "result", "why")
        for gate in record.get("gates") or []:
            status = str(gate.get("status"))
            why = summary.gate_reason(gate)
            if status == "failed" and gate.get("advice"):
                why += f"\n{gate['advice']}"
            table.add_row(self._text(gate.get("name")), self._text(status, _MARKS.get(status, "dim")), self._text(why))
        self._show_table("Gates", table)
        if record.get("findings"):
            self._show_table("Diagnosis", self._findings(record["findings"]))

    # How it is put together

    def _findings(self, found: Sequence[Mapping[str, Any]]) -> Table:
        table = self._table("found", "how bad", "what was seen, and what to change")
        for one in found:
            severity = str(one.get("severity"))
            words = self._text(f"{one.get('text')}\n{one.get('advice')}")
            table.add_row(self._text(one.get("name")), self._text(severity, _SEVERITIES.get(severity, "dim")), words)
        return table

    def _before_after(self, first: Record, last: Record) -> Table:
        table = self._table("", f"before (step {first['step']})", f"after (step {last['step']})")
        bound = self._target_kl()
        rows: list[tuple[str, Callable[[Record], str]]] = [
            ("loss", lambda r: fmt.number(eval_value(r, "loss"))),
            ("accuracy", summary.accuracy_text),
            ("margin", lambda r: fmt.signed(eval_value(r, "rewards/margins"))),
            (
                f"KL, bound {bound:g}" if bound is not None else "KL",
                lambda r: fmt.number(eval_value(r, "kl_divergence")),
            ),
        ]
        for label, text in rows:
            table.add_row(self._text(label), self._text(text(first)), self._text(text(last)))
        return table

    def _side_by_side(self, sample: Mapping[str, Any]) -> Table:
        table = self._table("reference", "policy")
        for column in table.columns:
            column.ratio = 1
        table.expand = True
        table.add_row(*(self._text(summary.said(sample.get(side)) or "(empty)") for side in ("reference", "policy")))
        return table

    def _table(self, *head: str) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in head:
            table.add_column(name, header_style="dim", overflow="fold")
        return table

    def _show_table(self, title: str, table: Table) -> None:
        self._say("")
        for line in fmt.plain(title).split("\n"):
            self._say(line, style="bold")
        self._print(table)

    def _places(self, run: summary.Run) -> list[tuple[str, str]]:
        folder = self.output_dir or Path(str(part(run.start, "options").get("output_dir") or "."))
        verdict = run.verdict or {}
        places = [("final model", str(folder / "final"))] if verdict.get("final") else []
        if verdict.get("best"):
            best = verdict["best"]
            places.append(
                ("best model", f"{folder / 'best'} (step {best.get('step')}, score {fmt.signed(best.get('score'))})")
            )
        elif any("score" in r and r["score"] is None for r in run.checkpoints):
            places.append(("best model", "none: no checkpoint was within the bound on KL"))
        places += [("report", str(folder / "report.html")), ("log", str(folder / "run.jsonl"))]
        if "tensorboard" in fmt.option(part(run.start, "options").get("report_to")):
            places.append(("curves", f"tensorboard --logdir {folder / 'tensorboard'}"))
        return places

    def _facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self._say(title, style="bold")
        if not self.live:
            for name, text in rows:
                self._say(f"  {name:<{max(len(n) for n, _ in rows)}}  {text}")
            return
        from rich.table import Table

        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows:
            grid.add_row(self._text(f"  {name}"), self._text(text))
        self._print(grid)

    def _target_kl(self) -> float | None:
        return summary.summarise(self._records).target_kl

    def _text(self, text: Any, style: str = "") -> Text:
        from rich.text import Text

        clean = fmt.plain(text)
        if not self.console.encoding.lower().startswith("utf"):
            clean = clean.encode(self.console.encoding, "replace").decode(self.console.encoding)
        return Text(clean, style=style)

    def _say(self, text: str, style: str = "") -> None:
        self._print(self._text(text.replace("\n", " "), style), soft_wrap=not self.live)

    def _print(self, what: RenderableType, soft_wrap: bool = False) -> None:
        self._guarded(lambda: self.console.print(what, soft_wrap=soft_wrap, highlight=False))

    def _refresh(self) -> None:
        if not self.live or self._gone:
            return
        if self._screen is None:
            from rich.live import Live

            self._screen = screen = Live(self._line, console=self.console, transient=True, refresh_per_second=4)
            self._guarded(lambda: screen.start(refresh=True))
        else:
            self._guarded(self._screen.refresh)

    def _end_line(self) -> None:
        if self._screen is not None:
            screen, self._screen = self._screen, None
            self._guarded(screen.stop)

    def _guarded(self, do: Callable[[], Any]) -> None:
        if self._gone:
            return
        try:
            do()
        except (OSError, ValueError):  # the stream was closed
            self._gone = True
        except SystemExit:  # rich's way to say that the pipe was closed; it sets `quiet` before
            if not self.console.quiet:
                raise
            self._gone = True
