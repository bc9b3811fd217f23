"""What the command line prints; no figure is made here."""
