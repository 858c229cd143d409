"""Where the policy really goes: answers that it samples to held-out prompts, and the exact KL along them."""

from __future__ import annotations

import itertools

import numpy as np

from jax_dpo.arrays import Tree
from jax_dpo.loss.scores import CHOSEN
from jax_dpo.models.decoder import precision
from jax_dpo.models.generate import generate
from jax_dpo.train import kl
from jax_dpo.train.evaluate import OnPolicy, OwnAnswers, of_pairs
from jax_dpo.train.state import Frozen, Knobs
from jax_dpo.trainer.datasets import PairSet, Sampled
from jax_dpo.trainer.run import Run
from jax_dpo.trainer.samples import distinct_prompts, stop_ids_of, whole_policy


def on_policy_of(run: Run, data: PairSet) -> OnPolicy | None:
    """What `eval_on_policy_prompts` asks for of one evaluation set; None where it asks for nothing, or no pair has a prompt.

    Answers are drawn at temperature 1 from the whole vocabulary, since the KL is that of the policy's own distribution: the mean over
    them of the sum of token KLs estimates without bias the KL between the distributions over answers of up to
    `eval_on_policy_tokens` tokens. Where there are fewer different prompts than asked for, they are answered several times.
    Random numbers follow from the seed and the step alone. The KL comes from the evaluation's own forward pass, an answer laid out
    as a pair that has no rejected one.
    """
    config, engine = run.args, run.engine
    distinct = distinct_prompts(data.pairs, config.eval_on_policy_prompts)
    if not distinct:
        return None
    prompts = list(itertools.islice(itertools.cycle(distinct), config.eval_on_policy_prompts))

    def measured(params: Tree, frozen: Frozen, knobs: Knobs, step: int) -> OwnAnswers:
        run.display.busy("sampling answers to held-out prompts")
        with precision(engine.dtype):
            answers = generate(
                engine.facts.policy,
                whole_policy(run, params, frozen),
                prompts,
                max_new_tokens=config.eval_on_policy_tokens,
                stop_ids=stop_ids_of(run.pairing.policy, run.tokenizer.loaded),
                temperature=1.0,
                seed=int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0]),
                mesh=engine.mesh,
            )
        sampled = engine.held_out(None, Sampled(prompts, answers, config.eval_on_policy_tokens))
        _, sums, _ = of_pairs(engine.evaluator, sampled, params, frozen, knobs)
        along, tokens = sums.kl[:, CHOSEN], sums.tokens[:, CHOSEN]
        text = lambda ids: run.tokenizer.loaded.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
        told = [
            {"prompt": text(prompt), "answer": text(answer), "kl": max(float(k), 0.0), "tokens": int(n)}
            for prompt, answer, k, n in zip(prompts, answers, along, tokens)
        ]
        return OwnAnswers(kl.on_policy(along, tokens), told)

    return measured
