"""A stand-in for CUDA devices: a library that takes the place of CUDA's driver, runtime and cuBLAS by ``LD_PRELOAD``.

Device memory is host memory that is mapped when it is touched, kernels and matrix products do nothing, and every call is recorded
by name, thread, device and stream. ``torch.cuda.is_available()`` is true, so that torch, DeepSpeed, Triton (which compiles for
sm_90) and fovea take the paths on the host that they take with a GPU. The current device is one of each thread, as in CUDA.

It shows which device and stream each thread works on, what is launched, where the host waits, what is copied, the collectives and
their sizes, and the host's CPU time. It does not show numbers, races or the speed of kernels. cuDNN is switched off.
"""
