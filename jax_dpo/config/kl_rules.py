"""How the KL is held: which values exist, and what must hold between them. A rule gets values and says what is wrong, or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_dpo.config.fields import nearest, show
from jax_dpo.errors import named

KL_ACTIONS = ("halve_lr", "raise_beta", "rollback")
KL_CONTROLLERS = ("none", "adaptive_beta", "pi_beta", "dual_kl_coef")
KL_JUDGED_ON = ("eval", "train")

# {option: its default}; what they set is of actions alone.
_OF_ACTIONS = {"kl_patience": 1, "kl_cooldown": 0, "kl_most_actions": None}


def precomputed(on: bool, moves: bool, kl_coef: float, controller: str) -> str | None:
    if not on:
        return None
    if moves:
        return "found true beside sync_ref_model, whose reference moves while training; set one of them to false"
    penalty = (
        f"kl_coef {show(kl_coef)}"
        if kl_coef > 0
        else "kl_controller dual_kl_coef"
        if controller == "dual_kl_coef"
        else ""
    )
    if penalty:
        return (
            f"found true beside {penalty}: the penalty needs the reference's whole distribution in every step. Set kl_coef to 0 (the KL of "
            "evaluations is exact all the same, and kl_actions, pi_beta and adaptive_beta act on it), or precompute_ref_log_probs to false"
        )
    return None


def no_repeats(values: list[str]) -> str | None:
    twice = sorted({value for value in values if values.count(value) > 1})
    return f"found {', '.join(twice)} more than once" if twice else None


def controller(adaptive: bool, controller: str) -> str | None:
    if not adaptive or controller in ("none", "adaptive_beta"):
        return None
    return f"found true beside kl_controller {controller}; one of them controls, so leave adaptive_beta out"


def beta_turned_twice(controller: str, actions: list[str]) -> str | None:
    if controller != "pi_beta" or "raise_beta" not in actions:
        return None
    return (
        "found pi_beta beside kl_actions raise_beta; pi_beta sets beta anew at each evaluation, so leave raise_beta out"
    )


def gains(gains: list[float]) -> str | None:
    if len(gains) == 2 and min(gains) >= 0 and max(gains) > 0:
        return None
    return f"found {show(gains)}, expected two numbers of at least 0, such as [1.0, 0.3]"


def judged_on(where: list[str], precomputed: bool) -> str | None:
    if not where:
        return "found an empty list, expected eval, train or both"
    if "train" in where and precomputed:
        return (
            "found train beside precompute_ref_log_probs, which leaves no reference to measure the KL of train steps against. Leave train "
            "out, or set precompute_ref_log_probs to false"
        )
    return no_repeats(where)


def per_action(value: int | dict[str, int] | None, least: int) -> str | None:
    """One number for all actions, or one for each that is named."""
    if value is None:
        return None
    given = value if isinstance(value, Mapping) else {"": value}
    for name, number in given.items():
        if name and name not in KL_ACTIONS:
            near = nearest(name, KL_ACTIONS)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"found {show(name)}, which is no action of kl_actions ({', '.join(KL_ACTIONS)}){hint}"
        if number < least:
            return f"found {show(number)}{f' for {name}' if name else ''}, expected a whole number of at least {least}"
    return None


def trust_region(on: bool, evaluate: str, precomputed: bool) -> str | None:
    if not on:
        return None
    if precomputed:
        return (
            "found true beside precompute_ref_log_probs, which leaves no reference to measure the KL of a step against; set one of them to "
            "false"
        )
    if evaluate == "no":
        return "found true beside eval_strategy no; its probe set is taken from held-out pairs, so set eval_strategy to steps or epoch"
    return None


def without_effect(values: Mapping[str, Any]) -> list[str]:
    """Sentences on options that can do nothing beside the others."""
    found = []
    acting = [name for name in ("kl_actions", "adaptive_beta") if values[name]]
    acting += ["kl_controller"] * (values["kl_controller"] != "none")
    if acting and values["eval_strategy"] == "no" and "train" not in values["kl_judged_on"]:
        found.append(
            named(
                "kl-not-judged",
                f"{' and '.join(acting)} can do nothing: the KL is judged at evaluations, and eval_strategy is no. Name an "
                "evaluation set, or set kl_judged_on to train",
            )
        )
    idle = [name for name, usual in _OF_ACTIONS.items() if values[name] != usual]
    if idle and not values["kl_actions"]:
        found.append(named("option-without-effect", f"{' and '.join(idle)} can do nothing: kl_actions names none"))
    if values["kl_window"] != 10 and "train" not in values["kl_judged_on"]:
        found.append(named("option-without-effect", "kl_window can do nothing: kl_judged_on does not name train"))
    if values["kl_probe_pairs"] != 16 and not values["kl_trust_region"]:
        found.append(named("option-without-effect", "kl_probe_pairs can do nothing: kl_trust_region is false"))
    return found
