"""How good a model's answers are.

Benchmarks of lm-evaluation-harness, example by example.
"""
