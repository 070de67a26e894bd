"""Photographs: files, data sets, quality, restoration."""
