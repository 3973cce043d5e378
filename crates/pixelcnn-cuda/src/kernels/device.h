// What all kernel files begin with on a GPU. emulator.h says the same to a C++ compiler.

typedef unsigned int u32;
typedef long long i64;

#define KERNEL extern "C" __global__ void
#define EXPORT(kernel)
#define EXPORT_TOGETHER(kernel)
#define INFINITY __int_as_float(0x7f800000)

__device__ u32 bits_of(float value) {
    return __float_as_uint(value);
}

__device__ float float_of(u32 bits) {
    return __uint_as_float(bits);
}

// The number of this thread among all.
__device__ i64 index() {
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

