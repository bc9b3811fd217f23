"""All malformed inputs: of test_malformed.py, and of benchmarks/malformed_inputs.py, which counts them for the docs."""

from __future__ import annotations

import malformed
import malformed_files
import malformed_recipes

CASES = [*malformed.CASES, *malformed_files.DATASETS, *malformed_recipes.RECIPES]
