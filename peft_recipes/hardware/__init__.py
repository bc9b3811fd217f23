"""This machine: device, precision by a measured trial, threads, and the environment recorded with figures.

Imports nothing of this package. Start with device.py.
"""
