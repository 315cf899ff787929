"""The benchmark: from a YAML file to runs of every method and seed, a table and figures."""
