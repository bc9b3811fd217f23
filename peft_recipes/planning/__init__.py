"""Parameters, memory and time of every arm, before any weight is loaded.

Imports `tasks` and below. Start with plan.py. memory.py estimates a training step's peak memory, step_memory.py
simulates the step on fake tensors, and scaling.py has the formulas for several processes.
"""
