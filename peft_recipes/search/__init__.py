"""Which rate and which rank: scans of short runs, ranks side by side, what full fine-tuning changed."""
