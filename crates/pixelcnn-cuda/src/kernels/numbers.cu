// The numbers that maps are made of: `map` is float, or bf16 where BF16 is defined. The residual
// stream, weight gradients, sums and all that is not a convolution's operand are float in any case.

struct bf16 {
    unsigned short bits;
};

__device__ float get(float value) {
    return value;
}

__device__ float get(bf16 value) {
    return float_of((u32)value.bits << 16);
}

__device__ void put(float& to, float value) {
    to = value;
}

// To the nearest, ties to the even one; NaN stays NaN.
__device__ void put(bf16& to, float value) {
    u32 bits = bits_of(value);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#ifdef BF16
typedef bf16 map;
#else
typedef float map;
#endif

