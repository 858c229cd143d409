"""What another attempt changes: tables written by hand from the rules at the head of the module."""

from __future__ import annotations

from typing import Any

import pytest

from jax_dpo.train.retry import Change, next_change

OPTIONS = {"learning_rate": 1e-6, "beta": 0.1, "warmup_steps": 10, "max_grad_norm": 1.0, "max_steps": 100}


def start(steps: int = 100, warmup: int = 10, **options: Any) -> dict[str, Any]:
    return {"options": {**OPTIONS, **options}, "plan": {"steps": steps, "warmup_steps": warmup}}


def verdict(*failed: str, value: float | None = 0.2, findings: tuple[str, ...] = ()) -> dict[str, Any]:
    gates = [
        {"name": n, "status": "failed" if n in failed else "passed", "value": value, "reason": "0.2 > 0.1"}
        for n in ("completed", "kl", "margin", "improving")
    ]
    return {"gates": gates, "findings": [{"name": name} for name in findings]}


def change(found: Change | None) -> tuple[str, float] | None:
    return None if found is None else (found.option, pytest.approx(found.new))


@pytest.mark.parametrize(
    ("failed", "value", "findings", "expected"),
    [
        ((), 0.2, (), None),
        (("kl",), 0.2, (), ("learning_rate", 5e-7)),
        (("kl",), None, (), ("learning_rate", 5e-7)),
        (("margin",), 0.0, (), ("learning_rate", 2e-6)),
        (("margin",), None, (), ("learning_rate", 5e-7)),
        (("margin",), 0.0, ("loss-spikes",), ("learning_rate", 5e-7)),
        (("improving",), 0.7, (), ("learning_rate", 5e-7)),
        (("improving",), 0.7, ("flat-margins",), ("learning_rate", 2e-6)),
        (("improving",), None, ("flat-margins",), ("learning_rate", 5e-7)),
        (("kl", "margin"), 0.2, ("flat-margins",), ("learning_rate", 5e-7)),  # the first gate decides
        (("completed",), 50.0, (), None),
        (("completed",), 50.0, ("loss-spikes",), ("learning_rate", 5e-7)),
    ],
)
def test_the_first_change(
    failed: tuple[str, ...], value: float | None, findings: tuple[str, ...], expected: Any
) -> None:
    assert change(next_change(verdict(*failed, value=value, findings=findings), start())) == expected


@pytest.mark.parametrize(
    ("gate", "findings", "ladder"),
    [
        ("kl", (), [("learning_rate", 5e-7), ("beta", 0.15), ("learning_rate", 2.5e-7), ("beta", 0.225)]),
        ("margin", (), [("learning_rate", 2e-6), ("beta", 0.05), ("learning_rate", 4e-6), ("beta", 0.025)]),
        (
            "improving",
            ("loss-spikes",),
            [("learning_rate", 5e-7), ("warmup_steps", 20), ("max_grad_norm", 0.5), ("learning_rate", 2.5e-7)],
        ),
    ],
)
def test_the_same_gate_again_takes_the_next_rung(gate: str, findings: tuple[str, ...], ladder: list[Any]) -> None:
    now, earlier = start(), []
    for option, value in ladder:
        found = next_change(verdict(gate, findings=findings), now, earlier)
        assert found is not None and (found.option, found.new) == (option, pytest.approx(value))
        assert found.old == now["options"][option] and found.gate == gate
        earlier.append((found, now["options"]))
        plan = {**now["plan"], **({"warmup_steps": int(value)} if option == "warmup_steps" else {})}
        now = {"options": {**now["options"], option: found.new}, "plan": plan}


@pytest.mark.parametrize(("kl", "margin", "improving"), [(0.04, 2e-6, 2e-6), (0.06, None, 5e-7)])
def test_a_policy_that_moves_is_not_moved_further(kl: float, margin: float | None, improving: float) -> None:
    for gate, rate in (("margin", margin), ("improving", improving)):
        found = verdict(gate, findings=("flat-margins",))
        found["gates"][1] |= {"value": kl, "bound": 0.1}
        assert change(next_change(found, start())) == (None if rate is None else ("learning_rate", rate))


def test_what_was_tried_is_not_tried_again() -> None:
    """Over the bound at 1e-6, flat at 5e-7: doubling would be 1e-6 again, so beta is lowered."""
    first = next_change(verdict("kl"), start())
    assert first is not None
    second = next_change(verdict("margin"), start(learning_rate=5e-7), [(first, OPTIONS)])
    assert change(second) == ("beta", 0.05)


def test_a_warm_up_that_outlasts_the_run_is_shortened_first() -> None:
    assert change(next_change(verdict("margin"), start(20, 100, warmup_steps=100))) == ("warmup_steps", 2)
    assert change(next_change(verdict("improving"), start(5, 5, warmup_steps=5))) == ("warmup_steps", 1)
    assert change(next_change(verdict("kl"), start(20, 100, warmup_steps=100))) == ("learning_rate", 5e-7)


def test_where_nothing_is_left() -> None:
    assert next_change(verdict("margin"), start(learning_rate=0.0)) is None
    # Without clipping and with half of the run as warm-up, the rate alone is left, and goes on being halved.
    bare = start(100, 50, warmup_steps=50, max_grad_norm=0.0)
    first = next_change(verdict("improving"), bare)
    assert change(first) == ("learning_rate", 5e-7)
    assert first is not None
    second = next_change(
        verdict("improving"), {**bare, "options": {**bare["options"], "learning_rate": 5e-7}}, [(first, OPTIONS)]
    )
    assert change(second) == ("learning_rate", 2.5e-7)


def test_a_change_in_words_and_in_json() -> None:
    found = next_change(verdict("kl"), start())
    assert found is not None and Change(**found.to_dict()) == found
    assert found.text == "learning_rate 1e-06 -> 5e-07, since gate kl failed: 0.2 > 0.1"
