"""Loads a kernel's PTX with the CUDA driver, which compiles it for the chip that is here."""

import ctypes

import torch
from compiled import ptx_cpu


def launch(ptx, name, grid, args, shared):
    """Run the kernel on the current stream; `args` are tensors and integers, in its order."""
    cuda = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()

    def check(code):
        assert code == 0, f"CUDA driver error {code}"

    torch.cuda.current_stream().synchronize()  # also makes PyTorch's context current
    check(cuda.cuModuleLoadData(ctypes.byref(module), ptx.encode() + b"\0"))
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    params, threads, *_ = ptx_cpu.parse(ptx)
    values = [
        (ctypes.c_uint64 if kind.endswith("64") else ctypes.c_int32)(
            arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
        )
        for (kind, _), arg in zip(params, [*args, *[0] * (len(params) - len(args))], strict=True)
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    sizes = (*(*grid, 1, 1)[:3], threads, 1, 1)
    check(cuda.cuLaunchKernel(function, *sizes, shared, stream, pointers, None))
    torch.cuda.synchronize()
    check(cuda.cuModuleUnload(module))
