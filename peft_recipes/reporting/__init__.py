"""Reports of a comparison: sentences, table and plots as Markdown, HTML and terminal output.

Everything is rendered from the `comparison` dict, so that a report can be rendered again from comparison.json.
Imports `statistics` and below; used by `cards` and above. Start with write.py; the style of the plots is in
figure_style.py.
"""
