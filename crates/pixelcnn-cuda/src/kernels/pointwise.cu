// What happens between the convolutions, value by value: pixelcnn-core's kernels/pointwise.rs says
// what each function computes. A thread computes one value. Maps are [images, h, w, channels], of fewer
// than 2^31 values: places in them are numbers of 32 bits, which divide faster.

// Which values of a block's map dropout drops: a function of a value's place alone, as on the CPU.
struct Drop {
    u32 keys[2];
    u32 threshold;
    float scale;
};

__device__ float kept(const Drop* drop, u32 at) {
    if (!drop) return 1;
    u32 h = at + drop->keys[0];
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

// Images scaled to [-1, 1], the first `taken` of their channels or all and a plane of ones:
// [pixels, taken].
KERNEL images(const unsigned char* levels, float* out, i64 pixels, int channels, int taken) {
    u32 at = index();
    if (at >= pixels * taken) return;
    u32 pixel = at / taken;
    int channel = at % taken;
    out[at] = channel == channels ? 1 : (levels[pixel * channels + channel] - 127.5f) / 127.5f;
}
EXPORT(images)

// A code of a pixel: its own (0), or that of the coarser map (1).
__device__ u32 code_of(const unsigned char* images, i64 pixel, int bytes, int which) {
    const unsigned char* at = images + pixel * bytes + 2 * which;
    return at[0] | (u32)at[1] << 8;
}

// The columns of a weight [outputs, codes] for the pixels' codes, with its bias, and a one behind each:
// [pixels, outputs + 1].
KERNEL embed(
    const unsigned char* images, const float* weight, const float* bias, float* out, i64 pixels,
    int bytes, int which, int codes, int outputs
) {
    u32 at = index();
    if (at >= pixels * (outputs + 1)) return;
    u32 pixel = at / (outputs + 1);
    int channel = at % (outputs + 1);
    if (channel == outputs) {
        out[at] = 1;
        return;
    }
    u32 code = code_of(images, pixel, bytes, which);
    out[at] = weight[(i64)channel * codes + code] + bias[channel];
}
EXPORT(embed)

// The gradient by that weight: a thread adds up the pixels that have its code, in their order.
KERNEL embed_by_weight(
    const unsigned char* images, const float* d_out, float* d_weight, i64 pixels, int bytes, int which,
    int codes, int outputs
) {
    i64 at = index();
    if (at >= (i64)codes * outputs) return;
    u32 code = at / outputs;
    int channel = at % outputs;
    float sum = 0;
    for (i64 pixel = 0; pixel < pixels; pixel++) {
        if (code_of(images, pixel, bytes, which) != code) continue;
        sum += d_out[pixel * (outputs + 1) + channel];
    }
    d_weight[(i64)channel * codes + code] = sum;
}
EXPORT(embed_by_weight)

// And by its bias, which every pixel has: the sums of the rows of the gradient by the weight.
KERNEL embed_by_bias(const float* d_weight, float* d_bias, int codes, int outputs) {
    int channel = index();
    if (channel >= outputs) return;
    d_weight += (i64)channel * codes;
    double sum = 0;
    for (int code = 0; code < codes; code++) sum += d_weight[code];
    d_bias[channel] = sum;
}
EXPORT(embed_by_bias)

// What is added to a map's channels before anything else: the biases of the layers that made it.
struct Biases {
    const float* first;
    const float* second;
};

__device__ float added(Biases biases, int channel) {
    return (biases.first ? biases.first[channel] : 0) + (biases.second ? biases.second[channel] : 0);
}

// The nonlinearity with its dropout, of a map or of a part of a concatenation.
template <class X>
__device__ void bend(
    const X* x, Biases biases, const Drop* drop, map* y, i64 values, Channels channels, int f
) {
    u32 at = index();
    if (at >= values) return;
    u32 pixel = at / channels.count;
    int own = at % channels.count, channel = channels.first + own;
    float v = get(x[at]) + added(biases, own), positive = fabsf(v);
    float bent = f == RELU ? 0 : expm1f(-positive);
    if (f == CONCAT_ELU) {
        u32 plus = pixel * 2 * channels.of + channel, minus = plus + channels.of;
        put(y[plus], (v > 0 ? positive : bent) * kept(drop, plus));
        put(y[minus], (v > 0 ? bent : positive) * kept(drop, minus));
    } else {
        u32 to = pixel * channels.of + channel;
        // The comparisons let NaN through.
        float value = f == ELU ? (v > 0 ? v : bent) : (0 > v ? 0 : v);
        put(y[to], value * kept(drop, to));
    }
}

KERNEL bend_wide(
    const float* x, Biases biases, const Drop* drop, map* y, i64 values, Channels channels, int f
) {
    bend(x, biases, drop, y, values, channels, f);
}
EXPORT(bend_wide)

KERNEL bend_map(
    const map* x, Biases biases, const Drop* drop, map* y, i64 values, Channels channels, int f
) {
    bend(x, biases, drop, y, values, channels, f);
}
EXPORT(bend_map)

template <class X>
__device__ void bend_backward(
    const X* x, Biases biases, const Drop* drop, const map* dy, X* dx, i64 values,
    Channels channels, int f, int accumulate
) {
    u32 at = index();
    if (at >= values) return;
    u32 pixel = at / channels.count;
    int own = at % channels.count, channel = channels.first + own;
    float v = get(x[at]) + added(biases, own), through;
    float slope = f == RELU ? 0 : expf(-fabsf(v));
    if (f == CONCAT_ELU) {
        u32 plus = pixel * 2 * channels.of + channel, minus = plus + channels.of;
        float by_plus = get(dy[plus]) * kept(drop, plus);
        float by_minus = get(dy[minus]) * kept(drop, minus);
        through = v > 0 ? by_plus - by_minus * slope : by_plus * slope - by_minus;
    } else {
        u32 from = pixel * channels.of + channel;
        float by = get(dy[from]) * kept(drop, from);
        through = v > 0 ? by : by * slope;
    }
    put(dx[at], accumulate ? get(dx[at]) + through : through);
}

KERNEL bend_wide_backward(
    const float* x, Biases biases, const Drop* drop, const map* dy, float* dx, i64 values,
    Channels channels, int f, int accumulate
) {
    bend_backward(x, biases, drop, dy, dx, values, channels, f, accumulate);
}
EXPORT(bend_wide_backward)

KERNEL bend_map_backward(
    const map* x, Biases biases, const Drop* drop, const map* dy, map* dx, i64 values,
    Channels channels, int f, int accumulate
) {
    bend_backward(x, biases, drop, dy, dx, values, channels, f, accumulate);
}
EXPORT(bend_map_backward)

// What a pixel of the second convolution's output has added to it: the bias, and if `hw` is not null
// the rows of it that the image's two conditions name, or NONE.
struct Added {
    const float* bias;
    const float* hw;
    const u32* conditions;
};

#define NONE 0xffffffffu

__device__ float added(Added added, u32 image, int channels, int channel) {
    float sum = added.bias[channel];
    for (int i = 0; added.hw && i < 2; i++) {
        u32 row = added.conditions[2 * image + i];
        if (row != NONE) sum += added.hw[(i64)row * 2 * channels + channel];
    }
    return sum;
}

// y = x + a sigmoid(b), with the halves of c2.
KERNEL gate(
    const float* x, const map* c2, Added more, float* y, i64 values, int channels,
    int pixels_per_image
) {
    u32 at = index();
    if (at >= values) return;
    u32 pixel = at / channels, image = pixel / pixels_per_image;
    int channel = at % channels;
    const map* c = c2 + pixel * 2 * channels;
    float a = get(c[channel]) + added(more, image, channels, channel);
    float b = get(c[channels + channel]) + added(more, image, channels, channels + channel);
    y[at] = x[at] + a * sigmoid(b);
}
EXPORT(gate)

// The gradient by c2, which it overwrites.
KERNEL gate_backward(
    const float* dy, Added more, map* c2, i64 values, int channels, int pixels_per_image
) {
    u32 at = index();
    if (at >= values) return;
    u32 pixel = at / channels, image = pixel / pixels_per_image;
    int channel = at % channels;
    map* c = c2 + pixel * 2 * channels;
    float a = get(c[channel]) + added(more, image, channels, channel);
    float b = get(c[channels + channel]) + added(more, image, channels, channels + channel);
    float open = sigmoid(b);
    put(c[channel], dy[at] * open);
    put(c[channels + channel], dy[at] * a * (open * (1 - open)));
}
EXPORT(gate_backward)

// The gradient by the conditional weights [rows, channels], given that by c2: a thread adds up one
// value's over all pixels of the images that its row is added to, always in the same order.
KERNEL hw_backward(
    const map* d_c2, const u32* conditions, float* d_hw, int rows, int channels, int images,
    i64 pixels_per_image
) {
    i64 at = index();
    if (at >= (i64)rows * channels) return;
    u32 row = at / channels;
    int channel = at % channels;
    double sum = 0;
    for (int image = 0; image < images; image++) {
        if (conditions[2 * image] != row && conditions[2 * image + 1] != row) continue;
        const map* d = d_c2 + image * pixels_per_image * channels + channel;
        for (i64 pixel = 0; pixel < pixels_per_image; pixel++) sum += get(d[pixel * channels]);
    }
    d_hw[at] = sum;
}
EXPORT(hw_backward)

// Moves every pixel down and right, zeros coming in.
KERNEL shift(const float* from, float* to, i64 values, int h, int w, int channels, int down, int right) {
    u32 at = index();
    if (at >= values) return;
    int x = at / channels % w, y = at / channels / w % h;
    to[at] = y < down || x < right ? 0 : from[at - (down * w + right) * channels];
}
EXPORT(shift)

KERNEL shift_backward(
    const float* dy, float* dx, i64 values, int h, int w, int channels, int down, int right,
    int accumulate
) {
    u32 at = index();
    if (at >= values) return;
    int x = at / channels % w, y = at / channels / w % h;
    float moved = y + down >= h || x + right >= w ? 0 : dy[at + (down * w + right) * channels];
    dx[at] = accumulate ? dx[at] + moved : moved;
}
EXPORT(shift_backward)

// Adds a bias to every pixel.
KERNEL add_bias(const float* bias, float* to, i64 values, int channels) {
    u32 at = index();
    if (at < values) to[at] += bias[at % channels];
}
EXPORT(add_bias)

KERNEL add(const float* from, float* to, i64 values) {
    u32 at = index();
    if (at < values) to[at] += from[at];
}
EXPORT(add)

KERNEL copy(const float* from, float* to, i64 values) {
    i64 at = index();
    if (at < values) to[at] = from[at];
}
EXPORT(copy)

// Copies a map into a concatenation of which it is a part.
KERNEL concat(const float* from, float* to, i64 values, Channels channels) {
    u32 at = index();
    if (at >= values) return;
    u32 pixel = at / channels.count;
    to[pixel * channels.of + channels.first + at % channels.count] = from[at];
}
EXPORT(concat)

KERNEL concat_backward(const float* dy, float* dx, i64 values, Channels channels, int accumulate) {
    u32 at = index();
    if (at >= values) return;
    u32 pixel = at / channels.count;
    float through = dy[pixel * channels.of + channels.first + at % channels.count];
    dx[at] = accumulate ? dx[at] + through : through;
}
EXPORT(concat_backward)

KERNEL elu(const float* x, float* y, i64 values) {
    u32 at = index();
    if (at < values) y[at] = x[at] > 0 ? x[at] : expm1f(x[at]);
}
EXPORT(elu)

KERNEL elu_backward(const float* x, const float* dy, float* dx, i64 values, int accumulate) {
    u32 at = index();
    if (at >= values) return;
    float through = x[at] > 0 ? dy[at] : dy[at] * expf(x[at]);
    dx[at] = accumulate ? dx[at] + through : through;
}
EXPORT(elu_backward)
