"""The operation on a GPU in Triton: routes "gemm" and "triton", their kernels and block sizes."""
