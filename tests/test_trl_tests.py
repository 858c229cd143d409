"""TRL's own tests of DPO, and what stands for each here. Oracle: the files themselves; every test that is named must be there.

TRL's are tests/test_dpo_trainer.py, test_utils.py, test_data_utils.py, test_cli*.py and the distributed and invariant ones, at TRL
1.9 (its later packages ship none). Almost all of them train on a toy set and ask whether a loss came out and the parameters changed;
those here compare numbers. Not among them: what TRL tests of images, of Liger (gone), of bitsandbytes and of gpt-oss's own format.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# (what TRL tests, what stands for it, and what that compares)
COUNTERPARTS: tuple[tuple[str, str, str], ...] = (
    # tests/test_dpo_trainer.py: the collator
    (
        "padding and masks",
        "data/test_pack.py::test_a_row_says_what_its_trees_hold",
        "rows are packed: the same by hand",
    ),
    ("padding and masks", "train/test_trl_losses.py::test_token_statistics_are_those_of_padded_rows", "padded rows"),
    ("optional reference log-probabilities", "run/test_run_precompute.py::test_the_sums_are_trls", "TRL's sums"),
    (
        "pad_to_multiple_of",
        "run/test_run_training.py::test_pad_to_multiple_of_lengthens_rows",
        "lengths, and the numbers",
    ),
    # training
    (
        "train, by architecture",
        "models/test_logits.py::test_logits_are_those_of_transformers",
        "logits of every family",
    ),
    (
        "train, by architecture",
        "models/test_logits.py::test_loss_and_gradient_are_those_of_torch",
        "gradients of torch",
    ),
    ("train", "run/test_run_trl.py::test_full_training_follows_trl", "twelve steps that TRL recorded, final weights"),
    ("train, by dataset format", "data/test_tokenize.py::test_ids_of_every_row", "TRL's ids in every format"),
    ("train, by dataset format", "run/test_run_training.py::test_conversations_train", "the same model learns"),
    (
        "train with a model object",
        "run/test_run_reference.py::test_numbers_against_the_reference_that_is_meant",
        "metrics",
    ),
    (
        "15 loss types with evaluation",
        "train/test_trl_losses.py::test_loss_metrics_and_gradient_are_trls",
        "TRL's numbers",
    ),
    (
        "15 loss types with evaluation",
        "loss/test_trl_bare.py::test_losses_and_their_derivatives_are_trls",
        "and derivatives",
    ),
    (
        "15 loss types with evaluation",
        "loss/test_formulas.py::test_values_and_derivatives",
        "the papers' formulas to 1e-9",
    ),
    ("several losses (MPO)", "loss/test_family.py::test_a_list_is_the_weighted_sum_of_its_terms", "the sum"),
    ("use_weighting (WPO)", "loss/test_family.py::test_weighting_multiplies_and_has_no_gradient", "the formula"),
    ("ld_alpha", "train/test_trl_losses.py::test_loss_metrics_and_gradient_are_trls", "TRL's numbers"),
    ("f-divergences", "loss/test_formulas.py::test_values_and_derivatives", "the paper's formulas"),
    (
        "an explicit ref_model stays",
        "run/test_run_reference.py::test_training_leaves_the_reference_as_it_is",
        "to the bit",
    ),
    (
        "sync_ref_model moves it",
        "run/test_run_sync.py::test_the_reference_moves_by_the_formula_and_only_then",
        "the formula",
    ),
    ("train in half precision", "models/test_logits.py::test_bfloat16_stays_near_float32", "near float32"),
    (
        "train in half precision",
        "sharding/test_trajectory.py::test_every_way_of_computing_starts_at_zero",
        "margin and KL 0",
    ),
    ("gradient checkpointing", "run/test_run_equivalent.py::test_one_device", "one trajectory with and without"),
    ("an iterable data set", "run/test_run_trl_options.py::test_a_run_logs_what_trl_logs", "TRL's log of such a run"),
    (
        "an iterable data set",
        "run/test_run_trl_scripts.py::test_a_stream_is_read_as_far_as_the_run_takes",
        "rows that were read",
    ),
    ("padding_free", "test_trl_options.py::test_what_asks_for_something_is_answered", "refused: rows are packed"),
    (
        "chat_template_kwargs by row",
        "run/test_run_trl_scripts.py::test_each_row_has_template_arguments_of_its_own",
        "ids",
    ),
    ("tool calls", "data/test_tokenize.py::test_tool_calls_with_null_content", "ids of apply_chat_template"),
    (
        "rows that are truncated away",
        "data/test_tokenize.py::test_filter_and_truncation_of_every_config",
        "TRL's rows and ids",
    ),
    (
        "trust_remote_code",
        "test_trl_options.py::test_what_asks_for_something_is_answered",
        "refused: no such code is run",
    ),
    # evaluation
    ("train with evaluation", "run/test_run_trl.py::test_full_training_follows_trl", "eval_* that TRL recorded"),
    (
        "several evaluation sets",
        "run/test_run_trl_scripts.py::test_evaluate_takes_every_container",
        "each under its name",
    ),
    (
        "evaluate, by container",
        "run/test_run_trl_scripts.py::test_evaluate_takes_every_container",
        "one and the same numbers",
    ),
    (
        "evaluate, precomputed",
        "run/test_run_precompute.py::test_control_acts_on_the_exact_kl_of_evaluations",
        "exact KL",
    ),
    (
        "precompute after training raises",
        "run/test_run_precompute.py::test_every_reference_has_its_numbers",
        "here it works",
    ),
    (
        "precompute at init survives",
        "run/test_run_precompute.py::test_a_run_is_the_one_with_the_reference_in_its_step",
        "metrics",
    ),
    (
        "precompute raises for a stream",
        "run/test_run_trl_scripts.py::test_a_stream_can_be_precomputed",
        "here it works",
    ),
    (
        "compute_metrics",
        "test_trl_surface.py::test_arguments_that_ask_for_something_else_are_answered",
        "refused with advice",
    ),
    (
        "train_dataset is needed",
        "run/test_run_trl_scripts.py::test_training_without_training_data_is_refused",
        "message",
    ),
    (
        "made with 7 kinds of eval_dataset",
        "run/test_run_trl_scripts.py::test_a_trainer_is_made_with_every_container",
        "sizes",
    ),
    # PEFT
    (
        "LoRA: base frozen, adapter moved",
        "run/test_run_trl.py::test_adapters_follow_trl",
        "TRL's steps and final adapters",
    ),
    ("LoRA: base frozen, adapter moved", "run/test_run_peft.py::test_four_steps_as_trl_trains_them", "options of PEFT"),
    (
        "a PeftModel with a ref adapter",
        "run/test_run_trl_cuts.py::test_an_adapter_that_came_in_trained_trains_on",
        "TRL's log",
    ),
    (
        "a PeftModel with a ref adapter",
        "weights/test_peft_objects.py::test_base_and_active_adapter_are_those_of_the_files",
        "weights",
    ),
    (
        "PEFT and gradient checkpointing",
        "sharding/test_trajectory.py::test_meshes_take_the_same_steps_with_an_adapter",
        "steps",
    ),
    (
        "target_parameters of experts",
        "test_trl_options.py::test_what_asks_for_something_is_answered",
        "refused",
    ),
    ("QLoRA", "test_trl_options.py::test_what_asks_for_something_is_answered", "refused: load an unquantised model"),
    ("tags", "report/test_card.py::test_a_full_model", "the card's header"),
    ("tags", "report/test_card.py::test_an_adapter", "the card's header"),
    # tests/test_utils.py
    ("pad", "data/test_pack.py::test_pack_places_every_tree_once_within_the_bounds", "trees in place of padding"),
    ("selective_log_softmax", "ops/test_token_stats.py::test_values", "float64 by the whole vocabulary"),
    ("entropy_from_logits", "ops/test_token_stats.py::test_values", "float64 by the whole vocabulary"),
    ("ChunkedLogProb", "ops/test_token_stats.py::test_gradients_are_those_of_whole_logits", "value and gradient"),
    ("ChunkedLogProb", "ops/test_token_stats.py::test_bfloat16_weights_are_summed_in_float32", "value and gradient"),
    (
        "get_peft_config",
        "run/test_run_commands.py::test_lora_trains_an_adapter_over_a_base_without_a_copy",
        "use_peft, lora_*",
    ),
    ("model card", "report/test_card.py::test_the_best_checkpoint_has_its_own_numbers", "its text"),
    ("use_adapter", "run/test_run_peft.py::test_adapters_do_not_leak_into_each_other", "logits"),
    # tests/test_data_utils.py
    ("is_conversational", "data/test_pairs.py::test_layout_is_the_first_deciding_rows", "by hand"),
    ("apply_chat_template", "data/test_tokenize.py::test_ids_of_every_row", "TRL's ids"),
    ("extract_prompt", "data/test_pairs.py::test_common_beginning", "TRL's splits"),
    # tests/test_cli.py, test_cli_utils.py
    ("trl dpo runs", "run/test_run_training.py::test_the_run_passes_and_leaves_everything", "all that a run leaves"),
    ("several losses on the command line", "test_parse.py::test_flags", "the options"),
    (
        "TrlParser: file and command line",
        "test_parse.py::test_files_come_first_and_the_command_line_wins",
        "which wins",
    ),
    ("TrlParser: env", "run/test_run_trl_scripts.py::test_a_mixture_in_a_file_is_trained", "the variables"),
    ("TrlParser: what is unknown or broken", "test_parse.py::test_every_fault_is_told_with_its_place", "messages"),
    ("TrlParser: what is unknown or broken", "test_parse.py::test_a_broken_file_is_refused_with_its_name", "messages"),
    ("get_dataset", "data/test_mixture.py::test_a_mixture_is_that_of_trl", "rows, by the library datasets"),
    ("get_dataset", "data/test_mixture.py::test_what_cannot_be_is_refused", "messages"),
    # tests/distributed, tests/invariant
    ("ddp, zero, fsdp run", "sharding/test_trajectory.py::test_meshes_take_the_same_steps", "the steps of one device"),
    ("ddp, zero, fsdp run", "multihost/test_multihost.py::test_two_processes_are_one_run", "the run of one process"),
    ("precompute distributed", "sharding/test_trajectory.py::test_meshes_precompute_alike", "the sums of one device"),
    ("invariance of batch, accumulation, devices", "run/test_run_equivalent.py::test_one_device", "one trajectory"),
    ("invariance of batch, accumulation, devices", "run/test_run_equivalent.py::test_eight_devices", "one trajectory"),
)


@lru_cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("where", sorted({where for _, where, _ in COUNTERPARTS}))
def test_a_counterpart_is_there(where: str) -> None:
    file, _, name = where.partition("::")
    assert name in names_in(file), f"{where} is gone: name what stands for TRL's test now"
