"""Processes on the nodes of a Ray cluster: connection, what a node is sent, what comes back, nodes that die.

Nothing here knows what a run or a recipe is; `comparison` and `search` say which processes to start.
"""
