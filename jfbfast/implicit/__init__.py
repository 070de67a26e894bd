"""Solve for a fixed point, and differentiate it."""
