// Convolutions, plainly: a thread computes one value. They judge a library's on the device, and take
// its place where there is none.

// Two maps that lie over each other: tap (ky, kx) joins the coarser one's pixel (y, x) with the finer
// one's at (y * stride + ky - offset_y, x * stride + kx - offset_x). See Window in pixelcnn-core's
// network.rs. The weight is [coarse_channels, kernel_h, kernel_w, fine_channels].
struct Geometry {
    int images;
    int coarse_h, coarse_w, coarse_channels;
    int fine_h, fine_w, fine_channels;
    int kernel_h, kernel_w;
    int offset_y, offset_x;
    int stride;
};

__device__ bool within(int at, int size) {
    return at >= 0 && at < size;
}

// `coarse` = the convolution of `fine`, or `coarse` += it.
template <class T, class W>
__device__ void convolve(const T* fine, const W* weight, T* coarse, Geometry g, int accumulate) {
    i64 at = index();
    if (at >= (i64)g.images * g.coarse_h * g.coarse_w * g.coarse_channels) return;
    int channel = at % g.coarse_channels;
    i64 pixel = at / g.coarse_channels;
    int x = pixel % g.coarse_w, y = pixel / g.coarse_w % g.coarse_h;
    i64 image = pixel / g.coarse_w / g.coarse_h;
    float sum = 0;
    for (int ky = 0; ky < g.kernel_h; ky++) {
        int fine_y = y * g.stride + ky - g.offset_y;
        if (!within(fine_y, g.fine_h)) continue;
        for (int kx = 0; kx < g.kernel_w; kx++) {
            int fine_x = x * g.stride + kx - g.offset_x;
            if (!within(fine_x, g.fine_w)) continue;
            const T* values = fine + ((image * g.fine_h + fine_y) * g.fine_w + fine_x) * g.fine_channels;
            const W* tap =
                weight + (((i64)channel * g.kernel_h + ky) * g.kernel_w + kx) * g.fine_channels;
            for (int i = 0; i < g.fine_channels; i++) sum += get(values[i]) * get(tap[i]);
        }
    }
    put(coarse[at], accumulate ? get(coarse[at]) + sum : sum);
}

// `fine` = the transposed convolution of `coarse`, or `fine` += it.
template <class T, class W>
__device__ void transposed(const T* coarse, const W* weight, T* fine, Geometry g, int accumulate) {
    i64 at = index();
    if (at >= (i64)g.images * g.fine_h * g.fine_w * g.fine_channels) return;
    int channel = at % g.fine_channels;
    i64 pixel = at / g.fine_channels;
    int x = pixel % g.fine_w, y = pixel / g.fine_w % g.fine_h;
    i64 image = pixel / g.fine_w / g.fine_h;
    float sum = 0;
    for (int ky = 0; ky < g.kernel_h; ky++) {
        int from_y = y + g.offset_y - ky;
        if (from_y < 0 || from_y % g.stride || from_y / g.stride >= g.coarse_h) continue;
        for (int kx = 0; kx < g.kernel_w; kx++) {
            int from_x = x + g.offset_x - kx;
            if (from_x < 0 || from_x % g.stride || from_x / g.stride >= g.coarse_w) continue;
            i64 from = (image * g.coarse_h + from_y / g.stride) * g.coarse_w + from_x / g.stride;
            const T* values = coarse + from * g.coarse_channels;
            const W* tap = weight + ((i64)ky * g.kernel_w + kx) * g.fine_channels + channel;
            i64 step = (i64)g.kernel_h * g.kernel_w * g.fine_channels;
            for (int i = 0; i < g.coarse_channels; i++) sum += get(values[i]) * get(tap[i * step]);
        }
    }
    put(fine[at], accumulate ? get(fine[at]) + sum : sum);
}

// The gradient by the weight, given the two maps, one of which is a gradient itself.
template <class T>
__device__ void by_weight(const T* fine, const T* coarse, float* d_weight, Geometry g) {
    i64 at = index();
    if (at >= (i64)g.coarse_channels * g.kernel_h * g.kernel_w * g.fine_channels) return;
    int i = at % g.fine_channels, kx = at / g.fine_channels % g.kernel_w;
    int ky = at / g.fine_channels / g.kernel_w % g.kernel_h;
    int o = at / g.fine_channels / g.kernel_w / g.kernel_h;
    double sum = 0;
    for (i64 image = 0; image < g.images; image++) {
        for (int y = 0; y < g.coarse_h; y++) {
            int fine_y = y * g.stride + ky - g.offset_y;
            if (!within(fine_y, g.fine_h)) continue;
            // A row's sum in single precision loses nothing.
            float row = 0;
            for (int x = 0; x < g.coarse_w; x++) {
                int fine_x = x * g.stride + kx - g.offset_x;
                if (!within(fine_x, g.fine_w)) continue;
                row += get(fine[((image * g.fine_h + fine_y) * g.fine_w + fine_x) * g.fine_channels + i])
                    * get(coarse[((image * g.coarse_h + y) * g.coarse_w + x) * g.coarse_channels + o]);
            }
            sum += row;
        }
    }
    d_weight[at] = sum;
}

KERNEL convolve_wide(
    const float* fine, const float* weight, float* coarse, Geometry g, int accumulate
) {
    convolve(fine, weight, coarse, g, accumulate);
}
EXPORT(convolve_wide)

KERNEL convolve_map(const map* fine, const map* weight, map* coarse, Geometry g, int accumulate) {
    convolve(fine, weight, coarse, g, accumulate);
}
EXPORT(convolve_map)

KERNEL transposed_wide(
    const float* coarse, const float* weight, float* fine, Geometry g, int accumulate
) {
    transposed(coarse, weight, fine, g, accumulate);
}
EXPORT(transposed_wide)

KERNEL transposed_map(const map* coarse, const map* weight, map* fine, Geometry g, int accumulate) {
    transposed(coarse, weight, fine, g, accumulate);
}
EXPORT(transposed_map)

KERNEL by_weight_wide(const float* fine, const float* coarse, float* d_weight, Geometry g) {
    by_weight(fine, coarse, d_weight, g);
}
EXPORT(by_weight_wide)

KERNEL by_weight_map(const map* fine, const map* coarse, float* d_weight, Geometry g) {
    by_weight(fine, coarse, d_weight, g);
}
EXPORT(by_weight_map)

// The gradient by the bias: the sum of `d_to` [pixels, channels] over the pixels, in two stages. A
// block takes 32 channels and a chunk of the pixels, each row of its threads every eighth of them.
#define CHUNK 512

template <class T>
__device__ void sum_pixels(
    const T* d_to, double* partial, i64 pixels, int channels, double (*sums)[32]
) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    int channel = blockIdx.x * 32 + lane;
    i64 first = (i64)blockIdx.y * CHUNK, end = first + CHUNK < pixels ? first + CHUNK : pixels;
    double sum = 0;
    if (channel < channels) {
        for (i64 pixel = first + row; pixel < end; pixel += 8) {
            sum += get(d_to[pixel * channels + channel]);
        }
    }
    sums[row][lane] = sum;
    __syncthreads();
    if (row == 0 && channel < channels) {
        for (int other = 1; other < 8; other++) sum += sums[other][lane];
        partial[(i64)blockIdx.y * channels + channel] = sum;
    }
}

KERNEL sum_pixels_wide(const float* d_to, double* partial, i64 pixels, int channels) {
    __shared__ double sums[8][32];
    sum_pixels(d_to, partial, pixels, channels, sums);
}
EXPORT_TOGETHER(sum_pixels_wide)

KERNEL sum_pixels_map(const map* d_to, double* partial, i64 pixels, int channels) {
    __shared__ double sums[8][32];
    sum_pixels(d_to, partial, pixels, channels, sums);
}
EXPORT_TOGETHER(sum_pixels_map)

KERNEL sum_chunks(const double* partial, float* d_bias, int chunks, int channels) {
    i64 channel = index();
    if (channel >= channels) return;
    double sum = 0;
    for (int chunk = 0; chunk < chunks; chunk++) sum += partial[(i64)chunk * channels + channel];
    d_bias[channel] = sum;
}
EXPORT(sum_chunks)
