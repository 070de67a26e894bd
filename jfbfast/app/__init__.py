"""The web page of `jfbfast app`; it takes the extra ``app``."""
