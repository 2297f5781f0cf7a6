// Used only where torch's own CUDA packages are the only ones: they come without this header, of which a host compiler needs this much.
#pragma once
#define __host__
#define __device__
#define __global__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __managed__
#define __grid_constant__
#define __no_return__ __attribute__((noreturn))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __specialization_static static
#define __location__(a)
#define CUDARTAPI
#define CUDARTAPI_CDECL
