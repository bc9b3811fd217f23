"""The report of a comparison: sentences, table, plots; Markdown, HTML, terminal.

Everything is drawn from the `comparison` dict alone, so that a report can be made again from comparison.json. Imports
`statistics` and below. Start with write.py; colours and fonts of the plots are in figure_style.py.
"""
