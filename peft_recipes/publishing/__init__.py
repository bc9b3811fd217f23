"""From a run to the Hub and back: push an adapter with its evidence, reproduce it from there.

Imports `comparison` and below. Start with push.py, which decides what is uploaded; hub_client.py talks to the Hub.
reproduce.py trains a published run again, and tolerance.py decides whether its metrics agree.
"""
