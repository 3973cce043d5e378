// Convolutions, plainly: a thread computes one value. They judge cuDNN's on the device, and take
// its place where it is absent.

// A convolution reads the map `from` and writes the map `to`, the finer or the coarser one: tap
// (ky, kx) joins the coarser map's pixel (y, x) with the finer one's at
// (y * stride + ky - offset_y, x * stride + kx - offset_x). See Window in pixelcnn-core's network.rs.
struct Geometry {
    int images;
    int from_h, from_w, from_channels;
    int to_h, to_w, to_channels;
    int kernel_h, kernel_w;
    int offset_y, offset_x;
    int stride;
    // Whether `from` is the finer map.
    int from_finer;
    // Whether weights are [taps, to_channels, from_channels], and not the other way round.
    int backward;
};

// The place along one axis that tap k joins with `to`, or -1.
__device__ int joined(int to, int k, int offset, int stride, int from_finer, int from_size) {
    int from = from_finer ? to * stride + k - offset : to + offset - k;
    if (!from_finer) {
        if (from < 0 || from % stride) return -1;
        from /= stride;
    }
    return from >= 0 && from < from_size ? from : -1;
}

// `to` = the convolution of `from` plus `bias`, if that is not null; or `to` += it.
KERNEL convolve(
    const float* from, const float* weight, const float* bias, float* to, Geometry g, int accumulate
) {
    i64 at = index();
    if (at >= (i64)g.images * g.to_h * g.to_w * g.to_channels) return;
    int channel = at % g.to_channels;
    i64 pixel = at / g.to_channels;
    int x = pixel % g.to_w, y = pixel / g.to_w % g.to_h;
    i64 image = pixel / g.to_w / g.to_h;
    float sum = bias ? bias[channel] : 0;
    for (int ky = 0; ky < g.kernel_h; ky++) {
        int from_y = joined(y, ky, g.offset_y, g.stride, g.from_finer, g.from_h);
        if (from_y < 0) continue;
        for (int kx = 0; kx < g.kernel_w; kx++) {
            int from_x = joined(x, kx, g.offset_x, g.stride, g.from_finer, g.from_w);
            if (from_x < 0) continue;
            const float* values = from + ((image * g.from_h + from_y) * g.from_w + from_x) * g.from_channels;
            const float* tap = weight + (i64)(ky * g.kernel_w + kx) * g.from_channels * g.to_channels;
            const float* column = g.backward ? tap + (i64)channel * g.from_channels : tap + channel;
            i64 step = g.backward ? 1 : g.to_channels;
            for (int i = 0; i < g.from_channels; i++) sum += values[i] * column[i * step];
        }
    }
    to[at] = accumulate ? to[at] + sum : sum;
}
EXPORT(convolve)

// The gradient by the weight [taps, from_channels, to_channels] of a forward convolution, given that
// by `to`.
KERNEL convolve_weight(const float* from, const float* d_to, float* d_weight, Geometry g) {
    i64 at = index();
    if (at >= (i64)g.kernel_h * g.kernel_w * g.from_channels * g.to_channels) return;
    int o = at % g.to_channels, i = at / g.to_channels % g.from_channels;
    int tap = at / g.to_channels / g.from_channels;
    int ky = tap / g.kernel_w, kx = tap % g.kernel_w;
    double sum = 0;
    for (i64 image = 0; image < g.images; image++) {
        for (int y = 0; y < g.to_h; y++) {
            int from_y = joined(y, ky, g.offset_y, g.stride, g.from_finer, g.from_h);
            if (from_y < 0) continue;
            // A row's sum in single precision loses nothing.
            float row = 0;
            for (int x = 0; x < g.to_w; x++) {
                int from_x = joined(x, kx, g.offset_x, g.stride, g.from_finer, g.from_w);
                if (from_x < 0) continue;
                row += from[((image * g.from_h + from_y) * g.from_w + from_x) * g.from_channels + i]
                    * d_to[((image * g.to_h + y) * g.to_w + x) * g.to_channels + o];
            }
            sum += row;
        }
    }
    d_weight[at] = sum;
}
EXPORT(convolve_weight)

// The gradient by the bias: the sum of `d_to` [pixels, channels] over the pixels. A block takes 32
// channels, each row of its threads every eighth pixel.
KERNEL sum_pixels(const float* d_to, float* d_bias, i64 pixels, int channels) {
    __shared__ double sums[8][32];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    int channel = blockIdx.x * 32 + lane;
    double sum = 0;
    if (channel < channels) {
        for (i64 pixel = row; pixel < pixels; pixel += 8) sum += d_to[pixel * channels + channel];
    }
    sums[row][lane] = sum;
    __syncthreads();
    if (row == 0 && channel < channels) {
        for (int other = 1; other < 8; other++) sum += sums[other][lane];
        d_bias[channel] = sum;
    }
}
EXPORT_TOGETHER(sum_pixels)
