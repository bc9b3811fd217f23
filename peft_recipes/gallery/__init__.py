"""`peft-recipes gallery`: one static page for all comparisons, runs and adapters below a folder.

collect.py finds them, entries.py turns each into the rows of the page, points.py into the points of its figure,
cards.py renders model cards as HTML, and write.py writes the folder. The style and the figures' colours are those of
the report. Imports `cards`, `reporting` and below; used by the command line. Start with write.py.
"""
