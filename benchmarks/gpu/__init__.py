"""The steps of benchmarks/on_gpu.py: what each measures, and how they are run one after another."""
