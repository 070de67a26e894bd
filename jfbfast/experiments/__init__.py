"""Training runs, and their evaluation."""
