"""The one line that is redrawn while a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from jax_dpo.report import format as fmt

# The order in which it gives up its parts where the terminal is narrow.
_DISPENSABLE = ("speed", "accuracy", "margin", "loss")


class LiveLine:
    """The one line that is redrawn: how far the run is, its last metrics, and the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._doing: str | None = None
        self._since = 0.0
        self._first: tuple[int, float] | None = None
        self._left: tuple[float, float] | None = None  # seconds, and when that was so
        self.step, self.total = 0, 0
        self.metrics: dict[str, Any] = {}

    def doing(self, what: str | None) -> None:
        """Puts a word in place of the metrics, until it is taken back."""
        if what != self._doing:
            self._doing, self._since = what, self._clock()

    def move(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        self.step, self.total = step, total
        self.metrics.update({k: v for k, v in metrics.items() if v is not None})
        done, spent = step - self._first[0], now - self._first[1]
        each = spent / done if done else fmt.finite(self.metrics.get("step_time"))
        self._left = None if each is None else (each * max(0, total - step), now)

    def pieces(self) -> list[tuple[str, str]]:
        """The parts of the line, each with its name."""
        m = self.metrics
        accuracy = fmt.finite(m.get("rewards/accuracies"))
        if accuracy == 0 and m.get("rewards/margins") == 0:  # all rewards are equal: not wrong, only undecided
            accuracy = None
        parts = [("step", f"{self.step}/{self.total}")]
        parts.append(("loss", f"loss {fmt.number(m.get('loss'), 3)}"))
        parts.append(("margin", f"margin {fmt.signed(m.get('rewards/margins'), 3)}"))
        parts.append(("accuracy", f"acc {fmt.NONE if accuracy is None else f'{100 * accuracy:.0f}%'}"))
        if "kl_divergence" in m or "kl_estimate" not in m:  # an estimate from given answers is no KL
            parts.append(("kl", f"KL {fmt.number(m.get('kl_divergence'), 3)}"))
        speed = fmt.finite(m.get("pairs_per_second"))
        if speed is not None:
            parts.append(("speed", f"{fmt.number(speed, 1)} pairs/s"))
        if self._left is not None:
            parts.append(("left", f"{fmt.clock(max(0.0, self._left[0] - (self._clock() - self._left[1])))} left"))
        return parts

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width - 1
        if self._doing is not None:
            elapsed = fmt.clock(self._clock() - self._since)
            head = f"{self.step}/{self.total}  " if self.total else ""
            yield Text(f"{head}{self._doing}  {elapsed}"[:width], style="cyan", no_wrap=True)
            return
        parts = self.pieces()
        for name in _DISPENSABLE:
            if sum(len(text) + 2 for _, text in parts) - 2 > width:
                parts = [p for p in parts if p[0] != name]
        text = "  ".join(text for _, text in parts)[:width]
        room = min(30, width - len(text) - 2)
        if room < 8 or not self.total:
            yield Text(text, no_wrap=True)
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(ProgressBar(total=self.total, completed=self.step, width=room), Text(text, no_wrap=True))
        yield grid
