"""Every field of TrainingArguments, SFTConfig and DPOConfig: honoured, owned by the recipe, or refused.

A test compares the table with the classes of the installed versions; a field that the table lacks is refused.
"""

from __future__ import annotations

from typing import NamedTuple

HONOURED, OWNED, REFUSED = "honoured", "owned", "refused"
FIXED = "nothing: "  # how the reason of an owned option begins that no recipe can change


class Row(NamedTuple):
    """What happens to one option. why: where an owned option is set, or why one is refused and what to use instead."""

    status: str
    why: str = ""


_SET_BY_CALL = "--seed or --seeds"
_UPLOAD = "`peft-recipes push`"
_LOGGED = "nothing: the loss of every step is logged, checked (guard finite-loss) and stored in run.json"
_LAUNCH = "the launch configuration (`accelerate launch --config_file`, recipes/accelerate/)"
_PACKING = "`batches` of the recipe itself: shared-prefix packing"
_DATA_IS_READY = "the data is prepared and tokenised before the trainer gets it; see `dataset` of the recipe"
_OWN_PREDICTIONS = "evaluation needs the results of each example; the task decides what it predicts"
_FULL_EVAL = "it casts the model in place, so the saved checkpoint would be rounded; set bf16 or fp16"
_SAME_STEPS = "all arms must take the same steps"

_HONOURED = (
    # Steps and batches
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "train_sampling_strategy", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    # Optimizer and schedule
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    # Loss
    "average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha", "router_aux_loss_coef",
    "loss_type", "loss_weights", "beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing",
    "use_weighting", "discopop_tau", "disable_dropout",
    # Precision, memory and speed
    "bf16", "fp16", "tf32", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "full_determinism",
    # Evaluation and the best model
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "save_strategy",
    "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    # Messages and trackers
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "report_to", "run_name", "project",
    # Several processes
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
)  # fmt: skip

_OWNED = {
    "learning_rate": "arms.<ARM>.learning_rate, each arm has its own",
    "seed": _SET_BY_CALL,
    "data_seed": _SET_BY_CALL,
    "output_dir": "--output",
    "max_length": "max_length of the recipe itself",
    "remove_unused_columns": "nothing: the task decides it",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": _UPLOAD,
    "hub_token": "`hf auth login`; a recipe never holds a token",
    **dict.fromkeys(("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _UPLOAD),
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"), _LOGGED),
    "include_num_input_tokens_seen": "nothing: tokens are counted without padding and stored in run.json",
    "skip_memory_metrics": "nothing: peak memory is measured and stored in run.json",
    "enable_jit_checkpoint": "nothing: SIGTERM writes a checkpoint",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "local_rank", "ddp_backend"), _LAUNCH),
    "packing": f"{_PACKING} is exact",
    "padding_free": f"{_PACKING} has no padding",
    "packing_strategy": f"{_PACKING} has one strategy",
    "eval_packing": f"{_PACKING} is used in evaluation as well",
    "completion_only_loss": "the data: the loss is on the answers, or on every token of plain text",
    "assistant_only_loss": "the data: the loss is on the last answer",
    "dataset_text_field": "dataset.text",
    "chat_template_path": "the model: its own template is used",
    "eos_token": "the model: its own is used",
    "pad_token": "the model: its own is used",
    "precompute_ref_log_probs": "nothing: the reference is computed once, before training",
    "precompute_ref_batch_size": "training.per_device_eval_batch_size",
    "sync_ref_model": "nothing: the reference stays the untrained base",
    "truncation_mode": "nothing: answers are cut at their end, at max_length",
    "model_init_kwargs": "the recipe itself (model, attention, trust_remote_code)",
    "trust_remote_code": "trust_remote_code of the recipe itself",
}

_REFUSED = {
    "auto_find_batch_size": f"{_SAME_STEPS}; set per_device_train_batch_size and gradient_accumulation_steps",
    "accelerator_config": f"{_SAME_STEPS}; set gradient_accumulation_steps and dataloader_drop_last",
    "parallelism_config": f"{_SAME_STEPS}; launch with recipes/accelerate/fsdp2.yaml to shard a model",
    "ignore_data_skip": "a resumed run would see other examples than an uninterrupted one; leave it out",
    "restore_callback_states_from_checkpoint": "a run's own callbacks are restored already; leave it out",
    "dataloader_in_order": "all arms see the examples in one order; leave it out",
    "length_column_name": "the task knows the lengths of its examples; leave it out",
    "save_only_model": "a run could not be resumed with the same losses; leave it out",
    "save_on_each_node": "rank 0 alone writes checkpoints; leave it out",
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), _FULL_EVAL),
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics",
         "batch_eval_metrics", "label_names"), _OWN_PREDICTIONS),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "a run always trains and evaluates; leave it out"),
    "use_cache": "training computes complete sequences, without a cache; leave it out",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "the loss has kernels of its own; leave it out"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
                    f"a run uploads nothing; use {_UPLOAD}"),
    "debug": "use the guard finite-loss, which stores the batch of a loss that is not finite",
    "ddp_timeout": "the process group exists before the trainer; leave it out",
    "activation_offloading": "trl's offloading does not work with these batches; set gradient_checkpointing",
    "pad_to_multiple_of": "batches are padded to their longest example; leave it out",
    "shuffle_dataset": "set train_sampling_strategy: every epoch is shuffled by the seed already",
    **dict.fromkeys(("dataset_kwargs", "dataset_num_proc"), _DATA_IS_READY),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"),
                    "the reference stays the untrained base; leave it out"),
}  # fmt: skip

# Where a class differs from the rows above.
_ONLY_FOR = {
    "DPOConfig": {
        "label_smoothing_factor": Row(REFUSED, "DPO's loss does not use it; set label_smoothing"),
        "average_tokens_across_devices": Row(REFUSED, "DPO's loss is a mean over pairs, not tokens; leave it out"),
    },
}

_TABLE = {
    **dict.fromkeys(_HONOURED, Row(HONOURED)),
    **{name: Row(OWNED, where) for name, where in _OWNED.items()},
    **{name: Row(REFUSED, why) for name, why in _REFUSED.items()},
}

# Values of honoured options that are refused.
REFUSED_VALUES = {
    ("train_sampling_strategy", "batch_rebalance"): f"{_SAME_STEPS}; use random, sequential or group_by_length",
}

# Honoured options without effect unless another option has one of these values (trl's DPOTrainer).
NEEDS = {
    "label_smoothing": ("loss_type", ("robust", "exo_pair")),
    "discopop_tau": ("loss_type", ("discopop",)),
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
}


def names() -> set[str]:
    """Every option that the table knows."""
    return set(_TABLE)


def row(option: str, class_name: str) -> Row:
    """The row of an option for a class of options ("TrainingArguments", "SFTConfig", "DPOConfig")."""
    missing = Row(REFUSED, "this version of the library has it, but it has not been checked here; leave it out")
    return _ONLY_FOR.get(class_name, {}).get(option) or _TABLE.get(option, missing)
