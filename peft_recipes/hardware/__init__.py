"""The machine: device, precision by a measured trial, threads, and the environment that figures come from.

Imports nothing of this package. Start with device.py.
"""
