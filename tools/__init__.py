"""Scripts over the package: the demo, benchmarks, the check of a GPU machine. Each is run by its path."""
