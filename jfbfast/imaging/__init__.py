"""Photographs: files, datasets, quality, restoration."""
