"""Many runs of one recipe, each in a fresh process, collected into one table.

Imports `adapters`, `training` and below. Start with compare.py; pool.py starts the processes, worker.py is what runs in
them.
"""
