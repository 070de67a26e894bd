"""The commands with more options than fit into `jfbfast.cli`, one a module, and what all commands share."""
