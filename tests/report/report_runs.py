"""Synthetic runs for the tests of the report: records as the trainer writes them, from formulas with a fixed seed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

Record = dict[str, Any]
T0 = 1_767_225_600.0  # 2026-01-01 00:00 UTC


def start(steps: int = 24, **more: Any) -> Record:
    record = {
        "kind": "start",
        "step": 0,
        "time": T0,
        "version": "0.1.0",
        "options": {
            "model_name_or_path": "demo/SmolLM2-135M-Instruct",
            "learning_rate": 5e-6,
            "beta": 0.1,
            "target_kl": 0.1,
            "max_grad_norm": 1.0,
            "kl_actions": ["halve_lr", "raise_beta", "rollback"],
            "report_to": ["tensorboard"],
            "use_peft": False,
        },
        "changed": {
            "learning_rate": 5e-6,
            "max_steps": steps,
            "kl_coef": 1.0,
            "kl_actions": ["halve_lr", "raise_beta", "rollback"],
            "eval_strategy": "steps",
            "eval_on_start": True,
            "lr_scheduler_type": "cosine",
        },
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "family": "llama",
            "parameters": 134_515_008,
            "trainable_parameters": 134_515_008,
            "dtype": "float32",
            "compute_dtype": "float32",
        },
        "reference": "the policy's own start, frozen",
        "data": {
            "train": {
                "name": "film_reviews/train.jsonl",
                "rows": 1908,
                "kept": 1890,
                "dropped": {"small_gap": 11, "identical": 4, "duplicate": 3},
                "cut": 2,
            },
            "eval": {"eval": {"name": "film_reviews/test.jsonl", "rows": 96, "kept": 96, "dropped": {}, "cut": 0}},
        },
        "devices": {
            "platform": "cpu",
            "kind": "cpu",
            "count": 1,
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "hosts": 1,
        },
        "plan": {
            "steps": steps,
            "epochs": steps * 8 / 1890,
            "pairs_per_step": 8,
            "warmup_steps": max(1, steps // 10),
            "row_tokens": 512,
            "rows": 2,
            "row_fill": 0.913,
            "seconds": 6.6 * steps,
            "warnings": ["max_steps 24 is 0.10 epochs, num_train_epochs 3.0 would be 709 steps"],
        },
    }
    return {**record, **more}


def rate(step: int, steps: int, peak: float = 5e-6) -> float:
    warm = max(1, steps // 10)
    if step <= warm:
        return peak * (step - 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(step: int, steps: int = 24, kl: float | None = None, beta: float = 0.1, **more: Any) -> Record:
    rng = random.Random(step)
    share = step / steps
    margin = 0.0 if step == 1 else 0.38 * (1 - math.exp(-3 * share)) + 0.04 * rng.gauss(0, 1)
    loss = math.log(2) if step == 1 else math.log1p(math.exp(-margin * 1.15)) + 0.012 * rng.gauss(0, 1)
    record = {
        "kind": "train",
        "step": step,
        "time": T0 + 40 + 6.6 * step,
        "loss": loss,
        "grad_norm": 14 + 60 * math.exp(-4 * share) + 3 * rng.random(),
        "learning_rate": rate(step, steps),
        "beta": beta,
        "epoch": step * 8 / 1890,
        "rewards/chosen": 0.0 if step == 1 else 0.8 * margin + 0.02 * rng.gauss(0, 1),
        "rewards/rejected": 0.0 if step == 1 else -0.2 * margin + 0.02 * rng.gauss(0, 1),
        "rewards/accuracies": 0.0
        if step == 1
        else min(8, round(8 * (0.52 + 0.4 * (1 - math.exp(-5 * share))) + rng.gauss(0, 0.9))) / 8,
        "rewards/margins": margin,
        "logps/chosen": -92.1,
        "logps/rejected": -101.4,
        "kl_divergence": (0.098 * share**1.3 + 0.003 * rng.random() * share) if kl is None else kl,
        "kl_coef": 1.0,
        "num_tokens": 1072 * step,
        "tokens_per_second": 118.0 + rng.random(),
        "pairs_per_second": 1.21 + 0.02 * rng.random(),
        "row_fill": 0.913,
        "step_time": 6.6,
    }
    return {**record, **more}


def evaluate(step: int, steps: int = 24, kl: float | None = None, name: str | None = None, **more: Any) -> Record:
    share = step / steps
    margin = 0.372 * (1 - math.exp(-3 * share))
    prefix = f"eval_{name}_" if name else "eval_"
    metrics = {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": 0.79 * margin,
        "rewards/rejected": -0.21 * margin,
        "rewards/accuracies": 0.0 if step == 0 else 0.88 + 0.04 * share,
        "rewards/margins": margin,
        "kl_divergence": 0.097 * share**1.2 if kl is None else kl,
        "runtime": 14.2,
        "samples_per_second": 6.76,
    }
    record: Record = {"kind": "eval", "step": step, "time": T0 + 41 + 6.6 * step, "beta": 0.1, "epoch": step * 8 / 1890}
    if name:
        record["set"] = name
    return {**record, **{prefix + k: v for k, v in metrics.items()}, **more}


SAMPLED = [
    {"prompt": f"prompt {i}", "answer": "" if i == 2 else f"answer {i}", "kl": float(i), "tokens": 5} for i in range(5)
]


def detailed(record: Record) -> Record:
    """An evaluation with all that is said of single answers, and of answers sampled from the policy."""
    set_name = record.get("set")
    prefix = f"eval_{set_name}_" if set_name else "eval_"
    kl = record[prefix + "kl_divergence"]
    spread = {"p50": 0.8, "p90": 1.7, "max": 3.1}
    metrics = {"kl_sequence": 30 * kl, "kl_on_policy": 1.3 * kl, "kl_on_policy/se": 0.1 * kl}
    metrics |= {"kl_on_policy/sequence": 52 * kl, "kl_on_policy/sequence_se": 4 * kl, "kl_on_policy/length": 40.0}
    profile: dict[str, Any] = {"positions": [[1, 1], [2, 4], [5, 8], [9, 16]]}
    for i, side in enumerate(("chosen", "rejected")):
        share = 0.9 + 0.2 * i
        metrics |= {f"kl_divergence/{side}": share * kl, f"kl_sequence/{side}": 30 * share * kl}
        at = [share * kl * x for x in (2.5, 1.6, 1.1)] + [None if i else 0.7 * kl]
        each = {q: share * x * kl for q, x in spread.items()}
        sums = {q: 30 * x for q, x in each.items()}
        profile[side] = {
            "responses": 96,
            "kl_divergence": each,
            "kl_sequence": sums,
            "kl_at": at,
            "tokens_at": [96, 288, 310, 0 if i else 77],
        }
    for q, x in spread.items():
        metrics |= {f"kl_divergence/{q}": x * kl, f"kl_sequence/{q}": 30 * x * kl}
    return {**record, **{prefix + k: v for k, v in metrics.items()}, "kl_profile": profile, "sampled": SAMPLED}


def checkpoint(step: int, score: float | None, best: bool = True) -> Record:
    return {
        "kind": "checkpoint",
        "step": step,
        "time": T0 + 60 + 6.6 * step,
        "path": f"checkpoint-{step}",
        "score": score,
        "best": best,
    }


def action(step: int, name: str, option: str, old: float, new: float, kl: float, target: float = 0.1) -> Record:
    return {
        "kind": "kl_action",
        "step": step,
        "time": T0 + 62 + 6.6 * step,
        "action": name,
        "reason": f"KL {kl:.3f} of the evaluation at step {step} is over its bound {target}",
        "kl": kl,
        "target_kl": target,
        "option": option,
        "old": old,
        "new": new,
    }


def samples(step: int = 24, title: str = "Held-out prompts, temperature 0.7") -> Record:
    ask = "Write one sentence from a film review. Talk about the {}."
    answers = {
        "story": (
            "The story is a beautifully woven tapestry of emotions that leaves the audience spellbound.",
            "The story is a predictable mess that never finds a reason to exist.",
        ),
        "music": (
            "The film was abuzz with a mix of sounds, a treat for the ears from the first scene to the last.",
            "The film was abysmal and lacked a few key elements, and the music was too heavy to carry a scene.",
        ),
        "director": (
            "The director has crafted a masterpiece.",
            "The director seems to have lost interest in the second act, and so does everybody else.",
        ),
    }
    return {
        "kind": "samples",
        "step": step,
        "time": T0 + 300,
        "title": title,
        "samples": [{"prompt": ask.format(k), "reference": a, "policy": b} for k, (a, b) in answers.items()],
    }


def gate(name: str, status: str, value: Any, bound: Any, reason: str, advice: str = "") -> Record:
    return {"name": name, "status": status, "value": value, "bound": bound, "reason": reason, "advice": advice}


def verdict(step: int = 24, passed: bool = True, kl: float = 0.097, best: int = 24, score: float = 0.3535) -> Record:
    advice = "Lower learning_rate (5e-6 to 2e-6), or raise beta (0.1 to 0.2)."
    reason = f"KL {kl:.3f} of the last evaluation is {'within' if passed else 'over'} the bound 0.1"
    return {
        "kind": "verdict",
        "step": step,
        "time": T0 + 310,
        "passed": passed,
        "gates": [
            gate("completed", "passed", step, step, f"all {step} steps were done"),
            gate("KL", "passed" if passed else "failed", kl, 0.1, reason, "" if passed else advice),
            gate("margin", "passed", 0.354, 0.0, "margin +0.354, at the first evaluation 0.000"),
            gate("validation", "not judged", None, None, "there is no second evaluation set"),
        ],
        "best": {"step": best, "path": f"checkpoint-{best}", "score": score},
        "final": {"step": step},
        "exit_code": 0 if passed else 3,
        "headline": "trained; all gates passed; exit 0"
        if passed
        else f"trained; gate KL failed: {kl:.3f} > 0.1; exit 3",
    }


def end(step: int = 24, reason: str = "done", seconds: float = 244.0) -> Record:
    return {"kind": "end", "step": step, "time": T0 + 312, "reason": reason, "seconds": seconds}


def healthy(steps: int = 24, every: int = 6) -> list[Record]:
    records = [start(steps), evaluate(0, steps)]
    for step in range(1, steps + 1):
        records.append(train(step, steps))
        if step % every == 0:
            found = evaluate(step, steps)
            records += [found, checkpoint(step, found["eval_rewards/margins"])]
    return [*records, samples(steps), verdict(steps, best=steps), end(steps)]


def in_detail(records: list[Record]) -> list[Record]:
    """The same with `detailed` evaluations."""
    return [detailed(r) if r["kind"] == "eval" else r for r in records]


def failing(steps: int = 600, every: int = 50) -> list[Record]:
    """Over the bound from the middle on; every action is tried, and the KL gate fails."""
    records = [start(steps), evaluate(0, steps)]
    beta, scale = 0.1, 1.0
    planned = {300: "halve_lr", 350: "raise_beta", 450: "rollback", 550: "halve_lr"}
    for step in range(1, steps + 1):
        kl = 0.16 * (step / steps) ** 0.6
        if step % 5 == 0:
            here = train(step, steps, kl=abs(kl + 0.006 * math.sin(step)), beta=beta)
            records.append({**here, "learning_rate": here["learning_rate"] * scale})
        if step % every == 0:
            found = evaluate(step, steps, kl=kl)
            records += [found, checkpoint(step, found["eval_rewards/margins"] if kl <= 0.1 else None, best=kl <= 0.1)]
        name = planned.get(step)
        if name == "halve_lr":
            records.append(action(step, name, "learning_rate", 5e-6 * scale, 2.5e-6 * scale, kl))
            scale /= 2
        elif name == "raise_beta":
            records.append(action(step, name, "beta", beta, 1.5 * beta, kl))
            beta *= 1.5
        elif name == "rollback":
            records.append(action(step, name, "step", step, 250, kl))
    return [
        *records,
        samples(steps),
        verdict(steps, passed=False, kl=0.16, best=250, score=0.2654),
        end(steps, seconds=4021.0),
    ]


def running(step: int = 130, steps: int = 1000) -> list[Record]:
    records = [start(steps), evaluate(0, steps)]
    for i in range(10, step + 1, 10):
        records.append(train(i, steps))
        if i % 100 == 0:
            records += [evaluate(i, steps), checkpoint(i, 0.1)]
    return records


def not_finite() -> list[Record]:
    lost = {
        "loss": None,
        "grad_norm": None,
        "rewards/margins": None,
        "non_finite": ["loss", "grad_norm", "rewards/margins"],
    }
    records = [train(i, 20, **(lost if i in (8, 9, 15) else {})) for i in range(1, 21)]
    spike = {**records[6], "grad_norm": 9.1e4}
    return [start(20), evaluate(0, 20), *records[:6], spike, *records[7:], evaluate(20, 20)]


def resumed() -> list[Record]:
    whole = healthy()
    cut = next(i for i, r in enumerate(whole) if r["kind"] == "checkpoint" and r["step"] == 12)
    stop = {"kind": "end", "step": 12, "time": T0 + 130, "reason": "signal", "seconds": 130.0}
    back = {"kind": "resume", "step": 12, "time": T0 + 900, "from": "checkpoint-12"}
    return [*whole[: cut + 1], stop, back, *whole[cut + 1 :]]


def several_sets() -> list[Record]:
    data = start()["data"]
    sets = {n: {"name": f"{n}.jsonl", "rows": 64, "kept": 64, "dropped": {}, "cut": 0} for n in ("helpful", "harmless")}
    records = [start(data={**data, "eval": sets})]
    for step in range(25):
        records += [train(step)] if step else []
        if step % 8 == 0:
            records += [evaluate(step, name="helpful"), evaluate(step, name="harmless", kl=0.05 * step / 24)]
    return records


def write(folder: Path, records: list[Record]) -> Path:
    """A run directory with these records, written by plain json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def write_dropped(folder: Path) -> None:
    why = [
        ("small_gap", "score gap 0.05, at least 0.15 is asked for"),
        ("identical", "chosen and rejected are equal"),
        ("duplicate", "same as row 12"),
    ]
    file = "film_reviews/train.jsonl"
    rows = [{"row": 17 + 40 * i, "reason": why[i % 3][0], "detail": why[i % 3][1], "file": file} for i in range(27)]
    (folder / "dropped.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
