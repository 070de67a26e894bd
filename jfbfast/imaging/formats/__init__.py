"""Read and write each image format; use `jfbfast.imaging.photographs`, which picks the format."""
