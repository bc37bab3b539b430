"""The benchmark of expert kernels against other implementations."""
