"""The rotary embedding that a Hugging Face config describes, in any of its spellings.

transformers 4: `rope_theta` and `rope_scaling` (with `type` or `rope_type`); transformers 5: `rope_parameters`.
Where several are there they must agree: readers differ in which they believe.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jax_dpo.errors import UserError
from jax_dpo.models.config import Rope

# Keys beside rope_type/type and rope_theta: needed, and allowed.
KINDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset(),
        frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}


def read_rope(hf: dict[str, Any], longest: int, where: str = "config.json", *, default_theta: float = 10000.0) -> Rope:
    """The `Rope` of a config; `longest` is its max_position_embeddings, `default_theta` the family's base where it names none.

    Raises UserError: rope-unknown for a kind or key without a known formula, rope-disagrees where two spellings in one
    file differ.
    """
    theta = hf.get("rope_theta")
    found: dict[str, Rope] = {}
    for name in ("rope_parameters", "rope_scaling"):
        block = hf.get(name)
        if not block:
            continue
        if not isinstance(block, dict):
            raise UserError("rope-unknown", f"{where}: {name} is {block!r}; expected an object with rope_type.")
        inner = block.get("rope_theta")
        if None not in (inner, theta) and inner != theta:
            raise UserError("rope-disagrees", f"{where}: rope_theta is {theta!r}, but {name}.rope_theta is {inner!r}.")
        base = next((x for x in (inner, theta) if x is not None), default_theta)
        found[name] = _one(block, base, hf, longest, f"{where}: {name}")
    if len(found) == 2 and found["rope_parameters"] != _with_theta(found["rope_scaling"], found["rope_parameters"], hf):
        raise UserError(
            "rope-disagrees",
            f"{where}: rope_parameters is {hf['rope_parameters']!r}, but rope_scaling is {hf['rope_scaling']!r}.",
        )
    if found:
        return next(iter(found.values()))
    return Rope(theta=_number(theta if theta is not None else default_theta, f"{where}: rope_theta"))


def _with_theta(scaling: Rope, parameters: Rope, hf: dict[str, Any]) -> Rope:
    """`rope_scaling` need not repeat the base that `rope_parameters` holds."""
    known = "rope_theta" in hf or "rope_theta" in hf["rope_scaling"]
    return scaling if known else replace(scaling, theta=parameters.theta)


def _one(block: dict[str, Any], theta: Any, hf: dict[str, Any], longest: int, where: str) -> Rope:
    kind = _kind(block, where)
    needed, allowed = KINDS[kind]
    given = {k: v for k, v in block.items() if v is not None and k not in ("rope_type", "type", "rope_theta")}
    if given.get("partial_rotary_factor") in (1, 1.0):
        del given["partial_rotary_factor"]
    unknown = sorted(set(given) - needed - allowed)
    if unknown:
        listed = ", ".join(f"{k} = {given[k]!r}" for k in unknown)
        raise UserError("rope-unknown", f"{where} of kind {kind!r} has {listed}, for which no formula is known here.")
    missing = sorted(needed - set(given))
    if missing:
        raise UserError("rope-unknown", f"{where} of kind {kind!r} lacks {', '.join(missing)}.")
    values = {k: v if k == "truncate" else _number(v, f"{where}.{k}") for k, v in given.items()}
    base = _number(theta, f"{where}.rope_theta")
    if kind == "default":
        return Rope(theta=base)
    if kind == "linear":
        return Rope(theta=base, kind=kind, factor=values["factor"])
    length = _original_length(values, hf, longest, where)
    if kind == "llama3":
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        if high <= low:
            raise UserError("rope-unknown", f"{where}: high_freq_factor {high} must be above low_freq_factor {low}.")
        return Rope(
            theta=base,
            kind=kind,
            factor=values["factor"],
            original_length=length,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = values.get("factor", longest / length)
    return Rope(
        theta=base,
        kind=kind,
        factor=factor,
        original_length=length,
        beta_fast=values.get("beta_fast", 32.0),
        beta_slow=values.get("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_yarn_attention(values, factor),
    )


def _kind(block: dict[str, Any], where: str) -> str:
    keys = {key: block[key] for key in ("rope_type", "type") if block.get(key) is not None}
    if len(set(map(str, keys.values()))) > 1:
        both = " and ".join(f"{key} = {value!r}" for key, value in keys.items())
        raise UserError("rope-disagrees", f"{where} has {both}; only one can be meant. Remove the wrong one.")
    for key, value in keys.items():
        if not isinstance(value, str) or value not in KINDS:
            known = ", ".join(KINDS)
            raise UserError("rope-unknown", f"{where}.{key} is {value!r}; the kinds that are known are {known}.")
    return next(iter(keys.values()), "default")


def _original_length(values: dict[str, Any], hf: dict[str, Any], longest: int, where: str) -> int:
    inner, outer = values.get("original_max_position_embeddings"), hf.get("original_max_position_embeddings")
    if None not in (inner, outer) and inner != outer:
        raise UserError(
            "rope-disagrees", f"{where}.original_max_position_embeddings is {inner:g}, outside it is {outer!r}."
        )
    return int(inner or outer or longest)


def _yarn_attention(values: dict[str, Any], factor: float) -> float:
    """Factor of cos and sin (YaRN, section 3.4): 0.1 ln(s) + 1, or a ratio of two where both mscales are given."""
    if "attention_factor" in values:
        return values["attention_factor"]

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in values and "mscale_all_dim" in values:
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1.0)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError("rope-unknown", f"{where} is {value!r}; expected a number above 0.")
    return float(value)
