"""What PEFT and TRL compute for adapters of each kind.

`python tests/parity/peft_numbers.py [FOLDER]` (torch, trl, peft) writes their files and numbers, and which modules PEFT adapts, by
default to tests/golden/adapters/kinds, which the tests of every day compare with.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
KINDS = GOLDEN / "adapters" / "kinds"
STARTS = GOLDEN / "training" / "start"
TOKENIZER = GOLDEN / "tokenizers" / "chatml"
STEPS, PAIRS_A_STEP = 4, 4

# peft.LoraConfig's fields; the model has two layers.
CASES: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": r"model\.layers\.(0\.self_attn\.[qk]_proj|1\..*_proj)",
        "exclude_modules": ["k_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 5},
    },
    "dora_layer": {
        "r": 3,
        "lora_alpha": 7,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "rank_pattern": {"up_proj": 2},
    },
    "saved": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    # Its embedding is its head: one matrix, trained as one.
    "tied": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
# (family, peft.LoraConfig's fields) whose adapted modules are written with rank and scale.
TARGETS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("qwen3", {"r": 4}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]}),
    ("llama", {"target_modules": "ALL-LINEAR", "exclude_modules": r"model\.layers\.0\..*"}),
    ("llama", {"target_modules": ["layers.0.self_attn.q_proj", "down_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 7], "layers_pattern": ["blocks", "layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"q": 3, "k_proj": 5},
            "alpha_pattern": {"[qk]_proj": 2},
        },
    ),
    (
        "llama",
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 4},
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {r"^model\.layers\.0.*": 1, "self_attn.q_proj": 32}}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["layernorm", "o_proj", "norm"]}),
    ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "norm"]}),
    (
        "mixtral",
        {"target_modules": r"model\.layers\.0\.self_attn\.[qk]_proj", "rank_pattern": {"layers.1.self_attn.k_proj": 2}},
    ),
    ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
)
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    # Where a gradient is next to nothing, the direction of Adam is rounding unless its epsilon is well above it: with the default of
    # 1e-8 the last loss of the first case differs by 8e-5 between two versions of XLA, with this by 6e-6.
    "adam_epsilon": 1e-6,
    "beta": 0.1,
    "logging_steps": 1,
    "max_length": 1024,
    "seed": 42,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "bf16": False,
}
LOGGED = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins")
LOGGED += ("logps/chosen", "logps/rejected", "num_tokens")


def rows() -> list[dict[str, str]]:
    pairs = json.loads((GOLDEN / "training" / "pairs.json").read_text(encoding="utf-8"))
    return pairs["train"][: STEPS * PAIRS_A_STEP]


def start_of(case: str) -> Path:
    return STARTS / ("qwen3" if case == "tied" else "llama")


def token_ids() -> np.ndarray:
    """[1, 6] token ids for which logits are written."""
    return np.random.default_rng(0).integers(0, 512, (1, 6))


def random_for(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def write_case(case: str, out: Path) -> None:
    """`initial/` and `final/` as PEFT saves them, logits of both and of the merged model, TRL's log."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(start_of(case)), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(CASES[case])))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                # Nothing is at its start: B not 0, magnitudes not the norms, copies not the base's.
                by = 0.05 if "lora_" in name and "magnitude" not in name else 0.02
                p.add_(by * torch.tensor(random_for(name, tuple(p.shape))))
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(str(out / "initial"), save_embedding_layers=False)
    ids = torch.tensor(token_ids())

    def logits(of: Any) -> np.ndarray:
        with torch.no_grad():
            return of.eval()(ids).logits.numpy()

    found = {"initial": logits(model)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            ref_model=AutoModelForCausalLM.from_pretrained(str(start_of(case)), dtype=torch.float32),
            args=DPOConfig(output_dir=folder, use_cpu=True, **OPTIONS),
            train_dataset=Dataset.from_list(rows()),
            processing_class=AutoTokenizer.from_pretrained(str(TOKENIZER)),
        )
        trainer.train()
    log = [{k: e[k] for k in LOGGED} for e in trainer.state.log_history if "loss" in e]
    model.save_pretrained(str(out / "final"), save_embedding_layers=False)
    found["final"] = logits(model)
    found["merged"] = logits(model.merge_and_unload())
    save_file(found, out / "logits.safetensors")
    (out / "run.json").write_text(json.dumps({"config": CASES[case], "options": OPTIONS, "log": log}, indent=1))
    for folder in ("initial", "final"):
        (out / folder / "README.md").unlink(missing_ok=True)
        config = out / folder / "adapter_config.json"
        config.write_text(config.read_text().replace(str(TESTS.resolve().parent) + "/", ""))  # no path of a machine


def adapted(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """{module: [rank, scale]} of what PEFT adapts, and the names of what it trains whole."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(GOLDEN / "models" / family)))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): [module.r["default"], module.scaling["default"]]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    mark = ".modules_to_save.default."
    saved = [n.removeprefix(prefix).replace(mark, ".") for n, _ in model.named_parameters() if mark in n]
    return {"family": family, "config": fields, "adapted": layers, "saved": sorted(saved)}


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else KINDS
    where.mkdir(parents=True, exist_ok=True)
    (where / "targets.json").write_text(json.dumps([adapted(*case) for case in TARGETS], indent=1))
    for case in CASES:  # in a few seconds each
        (where / case).mkdir(parents=True, exist_ok=True)
        write_case(case, where / case)
