"""Triton kernels of fastgist: one module an operation, each with its launchers and its ahead-of-time specs."""
