"""The loss with a KL penalty in plain torch, from full logits. TRL has no such loss; its trainer runs it, with its data and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def penalised(options: Mapping[str, Any]) -> Any:
    """A DPOTrainer of TRL's whose loss is mean -log sigmoid(beta (a - b) - beta kl_coef K).

    a, b are the log-ratios of chosen and rejected. K is a pair's exact KL: the sum over its answers' tokens (`kl_reduction` sequence),
    or that divided by their number (token). The gradient flows through K.
    """
    import torch
    from trl import DPOTrainer

    class Penalised(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            scored = inputs["completion_mask"][:, 1:] * inputs["attention_mask"][:, 1:]
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            policy = torch.log_softmax(model(**given).logits[:, :-1], -1)
            with torch.no_grad():
                reference = torch.log_softmax(self.ref_model(**given).logits[:, :-1], -1)
            token_kl = ((policy.exp() * (policy - reference)).sum(-1) * scored).sum(-1)
            target = inputs["input_ids"][:, 1:, None]
            ratios = ((policy - reference).gather(-1, target)[..., 0] * scored).sum(-1)
            a, b = ratios.chunk(2)
            kl = sum(token_kl.chunk(2))
            if options["kl_reduction"] == "token":
                kl = kl / sum(scored.sum(-1).chunk(2))
            loss = -torch.nn.functional.logsigmoid(self.beta * (a - b) - self.beta * options["kl_coef"] * kl).mean()
            return (loss, {}) if return_outputs else loss

    return Penalised
