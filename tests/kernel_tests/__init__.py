"""The Triton kernels against float64 and `kif_kernels.reference`: on a GPU, or in Triton's interpreter on the CPU.

Not `tests/kernels`: `tests` is on the import path, and transformers looks for a package named `kernels`.
"""
