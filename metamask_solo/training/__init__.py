"""From a config to a finished run: checks, trainer, run folders, resuming."""
