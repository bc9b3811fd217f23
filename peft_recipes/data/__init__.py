"""Data: where it comes from (sources), what its columns mean (columns), images and what is done to them (images)."""
