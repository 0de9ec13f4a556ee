"""The operation on a GPU in Triton: route "gemm", its kernels and block sizes."""
