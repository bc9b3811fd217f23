"""Faster or leaner implementations with the same results: attention, linear and LoRA layers, losses, the allocator.

Imports nothing of this package, so that each file can be read, tested and benchmarked alone. Used by `models` and the
trainers in `tasks`. Start with lora_linear.py.
"""
