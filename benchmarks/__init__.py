"""Microbenchmarks of kif_kernels, end-to-end benchmarks, recorded results and the regression gate."""
