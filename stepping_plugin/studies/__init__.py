"""Studies of the product: comparison, coverage, benchmarks."""
