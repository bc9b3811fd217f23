"""Console output of the commands; no figure is made here."""
