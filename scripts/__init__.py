"""Programs of the repository that are not part of the package: the demo and the benchmarks."""
