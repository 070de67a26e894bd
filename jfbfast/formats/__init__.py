"""Image files of each format as arrays and back, with what belongs to their colours; `jfbfast.data` is what to use."""
