"""What to write instead of an option or a value that TRL, transformers or an older script knows and jax_dpo does not take.

An option is never accepted and ignored, so each of these names is answered with a sentence. A ported script often writes options
at their defaults: the values of an `Advice` say what happens here anyway, so they are taken. Facts about TRL are those of TRL 1.16
and transformers 5.24.
"""

from __future__ import annotations

from typing import Any

from jax_dpo.config.fields import Advice, SameAs, Unreadable, coerce

_LATER = "not in this version"
_AUTOMATIC = "leave it out; jax_dpo decides this by itself"
_TORCH = "leave it out; it steers PyTorch, which is not used here"
_LOADER = "leave it out; one thread prepares the batches, and no data loader processes are started"
_MESH = "devices are laid out by mesh_data, mesh_fsdp and mesh_tensor; leave it out"
_HUB = "nothing is uploaded; upload output_dir/final afterwards with `hf upload`"
_PATCH = "leave it out; the exact memory-saving path is always on"
_BITS = "weights are trained in float32 or bfloat16; load an unquantised model"
_RECOMPUTE = "leave it out; gradient_checkpointing: true recomputes each layer"
_FORMAT = "the data's format is recognised from its columns; leave it out"


class Workers(Advice):
    """How many processes share some work: any number is taken, since it changes nothing of the result. Its value is the default's."""

    @property
    def hint(self) -> Any:
        return int | None

    def takes(self, value: Any) -> bool:
        try:
            count = coerce(value, self.hint)
        except Unreadable:
            return False
        return count in self.values or (isinstance(count, int) and not isinstance(count, bool) and count >= 0)


ADVICE: dict[str, str] = {
    # Renamed, or said in another way now.
    "warmup_ratio": "write the share as warmup_steps, such as warmup_steps: 0.1",
    "evaluation_strategy": "write eval_strategy",
    "evaluate_during_training": "write eval_strategy: steps",
    "eval_accumulation_steps": Advice(_AUTOMATIC, None),
    "logging_dir": "TensorBoard files are written to output_dir/tensorboard when report_to is tensorboard; leave it out",
    "logging_nan_inf_filter": Advice("leave it out; a loss that is not finite is never hidden", False),
    "log_level": Advice(
        "leave it out; messages of other libraries are set by their own environment variables", "passive"
    ),
    "log_level_replica": Advice("leave it out; only one process reports", "warning"),
    "log_on_each_node": Advice("leave it out; only one process reports", True, False),
    "group_by_length": Advice("leave it out; pairs are packed into rows, so padding is small in any order", False),
    "length_column_name": Advice(
        "leave it out; pairs are packed into rows, so padding is small in any order", "length"
    ),
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "train_batch_size": "write per_device_train_batch_size and gradient_accumulation_steps",
    "eval_batch_size": "write per_device_eval_batch_size",
    "tokens": "write added_tokens, and added_special_tokens for marks such as <|im_start|>",
    "special_tokens": "write eos_token, and added_special_tokens for further marks",
    "new_tokens": "write added_special_tokens or added_tokens",
    "chat_template": "write chat_template_path: a Jinja file, or a directory or Hub name whose template is taken",
    "batch_size": "write per_device_train_batch_size and gradient_accumulation_steps",
    "lr": "write learning_rate",
    "epochs": "write num_train_epochs",
    "num_epochs": "write num_train_epochs",
    "scheduler": "write lr_scheduler_type",
    "lr_scheduler": "write lr_scheduler_type",
    "optimizer": "write optim",
    "output": "write output_dir",
    "tf32": Advice(_TORCH, None),
    "fp16_full_eval": Advice("write bf16: true; evaluation computes as training does", False),
    "bf16_full_eval": Advice("write bf16: true; evaluation computes as training does", False),
    "half_precision_backend": _TORCH,
    "use_cpu": Advice("set the environment variable JAX_PLATFORMS=cpu", False),
    "no_cuda": Advice("set the environment variable JAX_PLATFORMS=cpu", False),
    "use_mps_device": "set the environment variable JAX_PLATFORMS",
    # Older TRL's DPO.
    "rpo_alpha": Advice("write loss_type: [sigmoid, sft] and loss_weights: [1.0, <rpo_alpha>]", None),
    "reference_free": Advice("there is always a reference: it is what the KL is measured against; leave it out", False),
    "max_completion_length": "write max_length, which bounds prompt and answer together",
    "max_target_length": "write max_length, which bounds prompt and answer together",
    "generate_during_eval": Advice(
        "write generate_samples: <number of prompts> for answers before and after the training", False
    ),
    "model_adapter_name": "leave it out; the adapter that is trained needs no name",
    "ref_adapter_name": "leave it out; an adapter's reference is its base, or the adapter as it was at the start",
    "force_use_ref_model": "leave it out; a reference model that is given is always used",
    "ref_model_init_kwargs": "name the reference by ref_model_name_or_path (in Python: ref_model=)",
    "model_init_kwargs": Advice(
        "load the model first: DPOTrainer(model=load_model(path, dtype=...)); on the command line model_revision",
        None,
        {},
    ),
    "label_pad_token_id": "leave it out; padding is never part of the loss",
    "padding_value": "leave it out; padding is never part of the loss",
    "pad_token": Advice("leave it out; padding is never part of the loss and needs no token", None),
    "padding_free": Advice("leave it out; pairs are packed into rows, so there is little padding", False),
    "is_encoder_decoder": "leave it out; the model is a decoder",
    "tools": "give the tools of a row in its column tools",
    "use_logits_to_keep": _PATCH,
    "use_num_logits_to_keep": _PATCH,
    "base_model_attribute_name": _AUTOMATIC,
    "use_liger_loss": _PATCH,
    "use_liger_kernel": Advice(_PATCH, False),
    "dataset_num_proc": Workers(
        "leave it out; tokenization is batched and its result is kept in dataset_cache_dir", None
    ),
    "dataset_kwargs": _FORMAT,
    # TRL 1.16's DPO options that are still to come.
    "activation_offloading": Advice(
        f"{_LATER}; gradient_checkpointing: true and micro_batch_tokens save memory", False
    ),
    "torch_empty_cache_steps": Advice(_TORCH, None),
    "trust_remote_code": Advice("leave it out; code that comes with a model is never run", False),
    # transformers' training arguments.
    "do_train": Advice("leave it out; `jax-dpo train` trains", True, False),
    "do_eval": Advice("leave it out; write eval_strategy: steps", False),
    "do_predict": Advice("leave it out; `jax-dpo evaluate` evaluates", False),
    "eval_do_concat_batches": Advice(_AUTOMATIC, True),
    "eval_on_end": "leave it out; the end of the training is always evaluated",
    "batch_eval_metrics": Advice(_AUTOMATIC, False),
    "prediction_loss_only": Advice(_AUTOMATIC, False),
    "include_for_metrics": Advice(f"{_LATER}; the metrics are those of TRL's DPO and the KL", []),
    "include_inputs_for_metrics": f"{_LATER}; the metrics are those of TRL's DPO and the KL",
    "include_num_input_tokens_seen": Advice("leave it out; num_tokens is always logged", "no", False),
    "include_tokens_per_second": "leave it out; tokens_per_second is always logged",
    "skip_memory_metrics": Advice(_AUTOMATIC, True),
    "save_only_model": Advice("leave it out; output_dir/best and output_dir/final hold the model alone", False),
    "save_safetensors": Advice("leave it out; models are always saved as safetensors", True),
    "save_on_each_node": Advice("leave it out; one process saves", False),
    "enable_jit_checkpoint": Advice("leave it out; SIGTERM always saves before the run ends", True, False),
    "restore_callback_states_from_checkpoint": Advice(
        "leave it out; callbacks may look at a run but do not steer it", False
    ),
    "ignore_data_skip": Advice("leave it out; a resumed run finds its place in the data at once", False),
    "full_determinism": Advice(
        "leave it out; a run with the same seed on the same machine gives the same numbers", False
    ),
    "auto_find_batch_size": Advice("write micro_batch_tokens; it lowers memory without changing the result", False),
    "optim_target_modules": Advice(f"{_LATER}; every parameter is trained, or the adapter's alone", None),
    "adafactor": "write optim: adafactor",
    "neftune_noise_alpha": Advice(f"{_LATER}; leave it out", None),
    "label_names": Advice(_AUTOMATIC, None),
    "label_smoothing_factor": Advice("write label_smoothing", 0.0),
    "remove_unused_columns": Advice("leave it out; columns that are not used are ignored", True, False),
    "average_tokens_across_devices": Advice(
        "leave it out; every pair counts the same on any number of devices", True, False
    ),
    "gradient_checkpointing_kwargs": Advice(_RECOMPUTE, None, {}, {"use_reentrant": False}),
    "activation_checkpointing": SameAs("gradient_checkpointing", bool | None),
    "activation_checkpointing_kwargs": Advice(_RECOMPUTE, None, {}, {"use_reentrant": False}),
    "past_index": "leave it out",
    "use_cache": Advice("leave it out; training keeps no cache of keys and values", False),
    "debug": Advice(_TORCH, "", []),
    "eval_use_gather_object": Advice(_AUTOMATIC, False),
    "dataloader_in_order": Advice(_LOADER, True),
    "trackio_space_id": Advice(_HUB, None),
    "trackio_bucket_id": Advice(_HUB, None),
    "trackio_static_space_id": Advice(_HUB, None),
    "torchdynamo": _TORCH,
    "torch_compile": Advice("leave it out; the step is always compiled", True, False),
    "torch_compile_backend": Advice("leave it out; the step is always compiled", None),
    "torch_compile_mode": Advice("leave it out; the step is always compiled", None),
    "jit_mode_eval": _TORCH,
    "use_ipex": _TORCH,
    "liger_kernel_config": Advice(_PATCH, None),
    "accelerator_config": Advice(_MESH, None),
    "parallelism_config": Advice(_MESH, None),
    "deepspeed": Advice(_MESH, None),
    "fsdp": Advice(_MESH, None, False, "", []),
    "fsdp_config": Advice(_MESH, None),
    "fsdp_min_num_params": _MESH,
    "fsdp_transformer_layer_cls_to_wrap": _MESH,
    "split_batches": _MESH,
    "num_machines": "write num_processes, process_id and coordinator_address, or start on a cluster that is recognised",
    "machine_rank": "write process_id",
    "main_process_ip": "write coordinator_address: <address>:<port>",
    "main_process_port": "write coordinator_address: <address>:<port>",
    "accelerate_config": _MESH,
    "local_rank": Advice(_MESH, -1),
    "ddp_backend": Advice(_MESH, None),
    "ddp_broadcast_buffers": Advice(_MESH, None, False),
    "ddp_bucket_cap_mb": Advice(_MESH, None),
    "ddp_find_unused_parameters": Advice(_MESH, None, False),
    "ddp_static_graph": Advice(_MESH, None, False),
    "ddp_timeout": Advice(_MESH, 1800),
    "tpu_num_cores": _MESH,
    "dataloader_num_workers": Workers(_LOADER, 0),
    "dataloader_prefetch_factor": Advice(_LOADER, None),
    "dataloader_persistent_workers": Advice(_LOADER, False),
    "dataloader_pin_memory": Advice(_LOADER, True, False),
    "dataloader_multiprocessing_context": Advice(_LOADER, None),
    "push_to_hub": Advice(_HUB, False),
    "hub_model_id": Advice(_HUB, None),
    "hub_strategy": Advice(_HUB, "every_save"),
    "hub_token": Advice(_HUB, None),
    "hub_private_repo": Advice(_HUB, None, False),
    "hub_always_push": Advice(_HUB, False),
    "hub_revision": Advice(_HUB, None),
    # TRL's script and model arguments.
    "dataset_mixture": "write datasets: a list of path, split, ...",
    "streaming": SameAs("dataset_streaming", bool | None, False),
    "columns": "rename the columns to prompt, chosen and rejected",
    "dataset": "write dataset_name",
    "dataset_path": "write dataset_name",
    "train_file": "write dataset_name",
    "eval_file": "write eval_dataset",
    "validation_file": "write eval_dataset",
    "ignore_bias_buffers": Advice(_TORCH, False),
    "dtype": Advice("weights are held in float32; bf16: true computes in bfloat16", "float32"),
    "torch_dtype": Advice("weights are held in float32; bf16: true computes in bfloat16", "float32"),
    "attn_implementation": Advice("leave it out; `jax-dpo doctor` tells which attention runs and why", None),
    "use_flash_attention_2": "leave it out; `jax-dpo doctor` tells which attention runs and why",
    "lora_target_parameters": Advice(
        "adapters on stacked parameters (the experts of a mixture) are not computed here; name linear layers in lora_target_modules",
        None,
    ),
    "lora_bias": "leave it out, or raise lora_r; a bias per adapter is not computed here",
    "load_in_8bit": Advice(_BITS, False),
    "load_in_4bit": Advice(_BITS, False),
    "bnb_4bit_quant_type": Advice(_BITS, "nf4"),
    "bnb_4bit_quant_storage": Advice(_BITS, None),
    "use_bnb_nested_quant": Advice(_BITS, False),
    "model": "write model_name_or_path",
    "ref_model": "write ref_model_name_or_path",
    "tokenizer": "write tokenizer_name_or_path",
    "peft_config": "write use_peft: true, lora_r, lora_alpha, lora_dropout and lora_target_modules",
    "train_dataset": "write dataset_name",
    "config": "on the command line write --config FILE; it cannot stand in the file itself",
}

# What belongs to the command line or to the trainer, met in DPOConfig(...).
_LORA_PYTHON = "pass peft_config=LoraConfig(r=..., lora_alpha=..., lora_dropout=..., target_modules=...) to DPOTrainer"
PYTHON_ADVICE: dict[str, str] = {
    "model": "pass it to DPOTrainer(model=...)",
    "model_name_or_path": "pass it to DPOTrainer(model=...)",
    "model_revision": "download the snapshot of that revision and pass its directory to DPOTrainer(model=...)",
    "ref_model": "pass it to DPOTrainer(ref_model=...)",
    "ref_model_name_or_path": "pass it to DPOTrainer(ref_model=...)",
    "tokenizer": "pass it to DPOTrainer(processing_class=...)",
    "processing_class": "pass it to DPOTrainer(processing_class=...)",
    "tokenizer_name_or_path": "pass the tokenizer to DPOTrainer(processing_class=...)",
    "peft_config": "pass it to DPOTrainer(peft_config=...)",
    "callbacks": "pass them to DPOTrainer(callbacks=...)",
    "train_dataset": "pass it to DPOTrainer(train_dataset=...)",
    "eval_dataset": "pass it to DPOTrainer(eval_dataset=...)",
    "dataset_name": "pass it to DPOTrainer(train_dataset=...)",
    "dataset_config": "pass a loaded data set to DPOTrainer(train_dataset=...)",
    "dataset_train_split": "pass a loaded data set to DPOTrainer(train_dataset=...)",
    "dataset_test_split": "pass a loaded data set to DPOTrainer(eval_dataset=...)",
    "test_split_size": "split the data set and pass the parts to DPOTrainer(train_dataset=..., eval_dataset=...)",
    "datasets": "join the data sets and pass the result to DPOTrainer(train_dataset=...)",
    "dataset_streaming": "pass an IterableDataset to DPOTrainer(train_dataset=...)",
    "streaming": "pass an IterableDataset to DPOTrainer(train_dataset=...)",
    "env": "set os.environ before jax is imported",
    "retry": "run `jax-dpo train --retry N`; in Python make another DPOTrainer with what the advice in verdict.json says",
    "use_peft": _LORA_PYTHON,
    "lora_r": _LORA_PYTHON,
    "lora_alpha": _LORA_PYTHON,
    "lora_dropout": _LORA_PYTHON,
    "lora_target_modules": _LORA_PYTHON,
    "lora_modules_to_save": "pass peft_config=LoraConfig(modules_to_save=[...], ...) to DPOTrainer",
    "lora_task_type": "pass peft_config=LoraConfig(...) to DPOTrainer",
    "use_rslora": "pass peft_config=LoraConfig(use_rslora=True, ...) to DPOTrainer",
    "use_dora": "pass peft_config=LoraConfig(use_dora=True, ...) to DPOTrainer",
}

_SAME_NUMBERS = "write adamw_torch: the same numbers; the state is spread over the devices instead of paged"
_EIGHT_BITS = (
    "no library of JAX has states of 8 or 4 bits; write adafactor (factored states, the least memory) or adamw_torch, whose states "
    "are spread over the devices"
)
_EIGHT_BIT_LION = "no library of JAX has states of 8 bits; write lion_32bit, which has one state where AdamW has two"
_NO_SUCH_OPTIMIZER = "is not in this version; write adamw_torch, adafactor, lion_32bit or sgd"

_ADAMWS = ("adamw", "adamw_hf", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")
_SMALL_ADAMWS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit")
# The other names of transformers 5.24.
_OTHER_OPTIMIZERS = (
    *("adamw_anyprecision", "stable_adamw", "grokadamw", "lomo", "adalomo", "apollo_adamw", "apollo_adamw_layerwise"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "adagrad"),
    *("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
)

# (option, value in lower case) -> what to write instead.
VALUE_ADVICE: dict[tuple[str, str], str] = {
    ("fp16", "true"): "float16 overflows in training; write bf16: true, or bf16: false for float32",
    ("loss_type", "kto_pair"): "KTO is not a loss of pairs; bco_pair is the nearest",
    ("loss_type", "bco"): "write bco_pair",
    ("loss_type", "aot_pair"): "it is called aot_unpaired now",
    ("loss_type", "sppo"): "write sppo_hard",
    ("loss_type", "slic"): "write hinge",
    ("loss_type", "rso"): "write hinge",
    ("loss_type", "exo"): "write exo_pair",
    ("loss_type", "nca"): "write nca_pair",
    ("loss_type", "apo"): "write apo_zero or apo_down",
    ("loss_type", "rdpo"): "write robust",
    ("loss_type", "rpo"): "write loss_type: [sigmoid, sft] and loss_weights: [1.0, <rpo_alpha>]",
    ("loss_type", "mpo"): "write loss_type: [sigmoid, bco_pair, sft] and loss_weights: [0.8, 0.2, 1.0]",
    ("loss_type", "odpo"): "write sigmoid with pair_columns: [margin]",
    ("loss_type", "beta_dpo"): "write sigmoid with beta_dpo_alpha: 0.6",
    ("loss_type", "wpo"): "write sigmoid with use_weighting: true",
    ("loss_type", "ld_dpo"): "write sigmoid with ld_alpha",
    ("loss_type", "dpo"): "write sigmoid",
    (
        "loss_type",
        "cdpo",
    ): "write sigmoid with label_smoothing and sigmoid_label_smoothing: true; robust is the unbiased form",
    ("loss_type", "simpo"): "SimPO has no reference; sigmoid_norm is DPO divided by the answers' lengths",
    ("loss_type", "orpo"): "ORPO has no reference; it is not among the losses here",
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "the schedule does not look at metrics; write cosine or linear",
    ("lr_scheduler_type", "greedy"): "the schedule does not look at metrics; write cosine or linear",
    ("lr_scheduler_type", "wsd"): "write warmup_stable_decay",
    (
        "train_sampling_strategy",
        "group_by_length",
    ): "pairs are packed into rows, so padding is small in any order; write random",
    (
        "train_sampling_strategy",
        "batch_rebalance",
    ): "pairs are packed into rows, so padding is small in any order; write random",
    ("train_sampling_strategy", "shuffle"): "write random",
    ("truncation_mode", "left"): "write keep_end",
    ("truncation_mode", "right"): "write keep_start",
    **{("optim", name): _SAME_NUMBERS for name in ("paged_adamw_32bit", "paged_adamw")},
    **{("optim", name): "write adamw_torch: the same formula" for name in _ADAMWS},
    **{("optim", name): _EIGHT_BITS for name in _SMALL_ADAMWS},
    **{("optim", name): _EIGHT_BIT_LION for name in ("lion_8bit", "paged_lion_8bit")},
    ("optim", "lion"): "write lion_32bit",
    (
        "optim",
        "paged_lion_32bit",
    ): "write lion_32bit: the same numbers; the state is spread over the devices instead of paged",
    **{("optim", name): f"{name} {_NO_SUCH_OPTIMIZER}" for name in _OTHER_OPTIMIZERS},
}
