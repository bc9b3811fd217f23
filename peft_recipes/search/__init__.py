"""Find a learning rate, a rank and target modules: scans of short runs, and the spectrum of a full fine-tune.

Imports `adapters` and below; imported by `publishing` and `cli`. Start with scan.py; spectra.py and extraction.py are
independent of it.
"""
