"""What is odd about the steps and epochs of a run, known before it."""

from __future__ import annotations

from jax_dpo.config import DPOConfig
from jax_dpo.errors import named
from jax_dpo.train.plan import Plan, total_steps
from jax_dpo.train.schedule import warmup_of


def plan_warnings(plan: Plan, config: DPOConfig) -> list[str]:
    """Sentences on a warm-up, a number of steps or a curriculum that the run's length does not fit."""
    found = []
    warmup = warmup_of(config.warmup_steps, plan.total)
    if warmup >= plan.total and config.lr_scheduler_type != "constant":
        peak = config.learning_rate * (plan.total - 1) / max(warmup, 1)
        found.append(
            named(
                "warm-up-outlasts-run",
                f"warm-up ({warmup} steps) outlasts the run ({plan.total} steps): the rate reaches {peak:.2g} of "
                f"{config.learning_rate:g}. Set warmup_steps to about {max(1, plan.total // 10)}.",
            )
        )
    by_epochs = total_steps(plan.pairs, plan.micro_batch, plan.accumulation, -1, config.num_train_epochs)
    if config.max_steps > 2 * by_epochs:
        epochs = config.max_steps * plan.pairs_per_step / plan.pairs
        found.append(
            named(
                "max-steps-over-epochs",
                f"max_steps {config.max_steps} is {epochs:.1f} epochs of {plan.pairs} pairs, more than twice the {by_epochs} steps of "
                f"num_train_epochs {config.num_train_epochs:g} (max_steps wins). Set max_steps to -1 to train by epochs.",
            )
        )
    if config.train_sampling_strategy == "curriculum" and plan.total < plan.per_epoch:
        unused = plan.pairs - plan.total * plan.pairs_per_step
        found.append(
            named(
                "curriculum-unfinished",
                f"the run ends before its first epoch does: the {unused} pairs of the narrowest gap, at the end of the "
                f"curriculum, are never trained on. An epoch is {plan.per_epoch} steps.",
            )
        )
    return found
