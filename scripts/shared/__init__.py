"""A package so that Hydra finds the YAML files here by pkg://."""
