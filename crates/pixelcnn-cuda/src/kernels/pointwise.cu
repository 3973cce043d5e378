// What happens between the convolutions, value by value: pixelcnn-core's kernels/pointwise.rs says
// what each function computes. A thread computes one value. Maps are [images, h, w, channels].

// Which values of a block's map dropout drops: a function of a value's place alone, as on the CPU.
struct Drop {
    u32 keys[2];
    u32 threshold;
    float scale;
};

__device__ float kept(const Drop* drop, i64 at) {
    if (!drop) return 1;
    u32 h = (u32)at + drop->keys[0];
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = h ^ (h >> 15) ^ drop->keys[1];
    h = h * 0x846ca68bu;
    h = (h ^ (h >> 16)) >> 8;
    return h < drop->threshold ? 0 : drop->scale;
}

enum { CONCAT_ELU, ELU, RELU };

// The channels of a map that is a part of a concatenation.
struct Channels {
    int count;
    int first;
    int of;
};

__device__ float sigmoid(float x) {
    float e = expf(-fabsf(x));
    return (x > 0 ? 1 : e) / (1 + e);
}

// Images scaled to [-1, 1], with a plane of ones: [pixels, channels + 1].
KERNEL images(const unsigned char* levels, float* out, i64 pixels, int channels) {
    i64 at = index();
    if (at >= pixels * (channels + 1)) return;
    i64 pixel = at / (channels + 1);
    int channel = at % (channels + 1);
    out[at] = channel == channels ? 1 : (levels[pixel * channels + channel] - 127.5f) / 127.5f;
}
EXPORT(images)

// The nonlinearity with its dropout, of a map or of a part of a concatenation.
KERNEL bend(const float* x, const Drop* drop, float* y, i64 values, Channels channels, int f) {
    i64 at = index();
    if (at >= values) return;
    i64 pixel = at / channels.count;
    int channel = channels.first + at % channels.count;
    float v = x[at], positive = fabsf(v);
    float bent = f == RELU ? 0 : expm1f(-positive);
    if (f == CONCAT_ELU) {
        i64 plus = pixel * 2 * channels.of + channel, minus = plus + channels.of;
        y[plus] = (v > 0 ? positive : bent) * kept(drop, plus);
        y[minus] = (v > 0 ? bent : positive) * kept(drop, minus);
    } else {
        i64 to = pixel * channels.of + channel;
        // The comparisons let NaN through.
        float value = f == ELU ? (v > 0 ? v : bent) : (0 > v ? 0 : v);
        y[to] = value * kept(drop, to);
    }
}
EXPORT(bend)

KERNEL bend_backward(
    const float* x, const Drop* drop, const float* dy, float* dx, i64 values, Channels channels,
    int f, int accumulate
) {
    i64 at = index();
    if (at >= values) return;
    i64 pixel = at / channels.count;
    int channel = channels.first + at % channels.count;
    float v = x[at], through;
    float slope = f == RELU ? 0 : expf(-fabsf(v));
    if (f == CONCAT_ELU) {
        i64 plus = pixel * 2 * channels.of + channel, minus = plus + channels.of;
        float by_plus = dy[plus] * kept(drop, plus), by_minus = dy[minus] * kept(drop, minus);
        through = v > 0 ? by_plus - by_minus * slope : by_plus * slope - by_minus;
    } else {
        i64 from = pixel * channels.of + channel;
        float by = dy[from] * kept(drop, from);
        through = v > 0 ? by : by * slope;
    }
    dx[at] = accumulate ? dx[at] + through : through;
}
EXPORT(bend_backward)

// What class conditioning adds to a pixel of the second convolution's output; null adds nothing.
__device__ const float* class_row(const float* hw, const u32* labels, i64 image, int channels) {
    return hw ? hw + (i64)labels[image] * 2 * channels : 0;
}

// y = x + a sigmoid(b), with the halves of c2.
KERNEL gate(
    const float* x, const float* c2, const float* hw, const u32* labels, float* y, i64 values,
    int channels, i64 pixels_per_image
) {
    i64 at = index();
    if (at >= values) return;
    i64 pixel = at / channels;
    int channel = at % channels;
    const float* row = class_row(hw, labels, pixel / pixels_per_image, channels);
    const float* c = c2 + pixel * 2 * channels;
    float a = c[channel] + (row ? row[channel] : 0);
    float b = c[channels + channel] + (row ? row[channels + channel] : 0);
    y[at] = x[at] + a * sigmoid(b);
}
EXPORT(gate)

// The gradient by c2, which it overwrites.
KERNEL gate_backward(
    const float* dy, const float* hw, const u32* labels, float* c2, i64 values, int channels,
    i64 pixels_per_image
) {
    i64 at = index();
    if (at >= values) return;
    i64 pixel = at / channels;
    int channel = at % channels;
    const float* row = class_row(hw, labels, pixel / pixels_per_image, channels);
    float* c = c2 + pixel * 2 * channels;
    float a = c[channel] + (row ? row[channel] : 0);
    float open = sigmoid(c[channels + channel] + (row ? row[channels + channel] : 0));
    c[channel] = dy[at] * open;
    c[channels + channel] = dy[at] * a * (open * (1 - open));
}
EXPORT(gate_backward)

// The gradient by the class projection [classes, channels], given that by c2: a thread adds up one
// value's over all pixels of the images of its class, always in the same order.
KERNEL class_backward(
    const float* d_c2, const u32* labels, float* d_hw, int classes, int channels, int images,
    i64 pixels_per_image
) {
    i64 at = index();
    if (at >= (i64)classes * channels) return;
    u32 label = at / channels;
    int channel = at % channels;
    double sum = 0;
    for (int image = 0; image < images; image++) {
        if (labels[image] != label) continue;
        const float* d = d_c2 + image * pixels_per_image * channels + channel;
        for (i64 pixel = 0; pixel < pixels_per_image; pixel++) sum += d[pixel * channels];
    }
    d_hw[at] = sum;
}
EXPORT(class_backward)

// Moves every pixel down and right, zeros coming in.
KERNEL shift(const float* from, float* to, i64 values, int h, int w, int channels, int down, int right) {
    i64 at = index();
    if (at >= values) return;
    int x = at / channels % w, y = at / channels / w % h;
    to[at] = y < down || x < right ? 0 : from[at - ((i64)down * w + right) * channels];
}
EXPORT(shift)

KERNEL shift_backward(
    const float* dy, float* dx, i64 values, int h, int w, int channels, int down, int right,
    int accumulate
) {
    i64 at = index();
    if (at >= values) return;
    int x = at / channels % w, y = at / channels / w % h;
    float moved = y + down >= h || x + right >= w ? 0 : dy[at + ((i64)down * w + right) * channels];
    dx[at] = accumulate ? dx[at] + moved : moved;
}
EXPORT(shift_backward)

KERNEL add(const float* from, float* to, i64 values) {
    i64 at = index();
    if (at < values) to[at] += from[at];
}
EXPORT(add)

KERNEL elu(const float* x, float* y, i64 values) {
    i64 at = index();
    if (at < values) y[at] = x[at] > 0 ? x[at] : expm1f(x[at]);
}
EXPORT(elu)

KERNEL elu_backward(const float* x, const float* dy, float* dx, i64 values, int accumulate) {
    i64 at = index();
    if (at >= values) return;
    float through = x[at] > 0 ? dy[at] : dy[at] * expf(x[at]);
    dx[at] = accumulate ? dx[at] + through : through;
}
EXPORT(elu_backward)
