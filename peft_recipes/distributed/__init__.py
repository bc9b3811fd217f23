"""Several processes of one run, by Accelerate: who is who, who takes which examples, what is spread and made whole."""
