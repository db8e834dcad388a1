"""The Triton kernels, one file per operator: the only files that import triton, loaded at the first launch."""
