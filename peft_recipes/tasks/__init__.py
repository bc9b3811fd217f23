"""Tasks, one file each, and the trainers that they share.

A task prepares data, builds the real Trainer (or TRL trainer) and evaluates. Imports `runs` and below. Start with
base.py; a new task is a file here, a row in registry.py and a row in recipe/options.py.

The trainers are transformers' Trainer and trl's SFTTrainer and DPOTrainer with mixins: trainer.py (counts, order of the
examples, sharding of a batch over ranks), checkpoint_mixin.py (resuming), method_mixin.py (AdaLoRA, LoRA+),
causal_trainer.py (prefix-shared packing) and trl_metrics.py (what trl logs, read once a logging step).
"""
