// The network pixel by pixel: pixelcnn-core's incremental/program.rs says what a sum, a tap and a ring
// are. Memory is that of each image times the number of images, pixels innermost but for images and
// channels. Where the pixel is, all kernels read from `at`: so the same ones, in the same order, serve
// many pixels.

struct Ring {
    i64 start;
    int scale, channels, rows, width;
};

struct Tap {
    Ring ring;
    int dy, dx;
    // Channels that it reads.
    int channels;
    int unused;
};

// A sum at some pixels of a row.
struct Sum {
    // Where its sums and its first bias begin, and how far apart classes' biases are.
    i64 start, bias;
    int class_bias;
    int scale, width;
    // 16 channels make a panel; so many for each half, of which a gated sum has two.
    int channels, panels, gated;
    // Of the pixels: the first one's column and the step to the next, or the column that is due.
    int first, step, count;
    // Whether it goes on with what was summed when the row began, and whether it is complete.
    int begun, complete;
    // Where the weights begin, and inputs of all taps.
    i64 weights;
    int taps, inputs;
    // What is made of it: `value` and two functions of that, none with rows 0.
    Ring residual, value, bent[2];
    int f[2];
};

#define PANEL 16

__device__ i64 place(Ring ring, int y, int x, int images) {
    int row = (y + ring.rows) % ring.rows;
    return (ring.start + ((i64)row * (ring.width + 2) + x + 1) * ring.channels) * images;
}

// Sums taps at pixels of a row, and makes the values of complete sums: a thread takes a channel of an
// image's pixel.
KERNEL sum_taps(
    float* memory, const float* weights, const Tap* taps, const u32* labels, const int* at, Sum sum,
    int images
) {
    i64 number = index();
    if (number >= (i64)sum.count * images * sum.channels) return;
    int channel = number % sum.channels;
    int image = number / sum.channels % images;
    int pixel = number / sum.channels / images;
    int y = at[0] >> sum.scale;
    int x = sum.step ? sum.first + pixel * sum.step : at[1] >> sum.scale;
    int columns = (sum.gated ? 2 : 1) * sum.panels * PANEL;
    float* own = memory + sum.start * images + ((i64)x * images + image) * columns;
    const float* bias = weights + sum.bias + (i64)sum.class_bias * (labels ? labels[image] : 0);
    float both[2] = {0, 0};
    for (int half = 0; half <= sum.gated; half++) {
        int column = half * sum.panels * PANEL + channel;
        float value = sum.begun ? own[column] : bias[column];
        const float* weight =
            weights + sum.weights + (i64)(column / PANEL) * sum.inputs * PANEL + column % PANEL;
        for (int tap = 0; tap < sum.taps; tap++) {
            Tap t = taps[tap];
            int tap_y = ((y << sum.scale) >> t.ring.scale) + t.dy;
            int tap_x = ((x << sum.scale) >> t.ring.scale) + t.dx;
            const float* from =
                memory + place(t.ring, tap_y, tap_x, images) + (i64)image * t.ring.channels;
            for (int i = 0; i < t.channels; i++, weight += PANEL) value += from[i] * *weight;
        }
        both[half] = value;
        if (!sum.complete) own[column] = value;
    }
    if (!sum.complete) return;
    float value = both[0];
    if (sum.gated) {
        i64 from = place(sum.residual, y, x, images) + (i64)image * sum.residual.channels + channel;
        value = memory[from] + both[0] * sigmoid(both[1]);
    }
    if (sum.value.rows) {
        memory[place(sum.value, y, x, images) + (i64)image * sum.value.channels + channel] = value;
    }
    for (int i = 0; i < 2; i++) {
        Ring ring = sum.bent[i];
        if (!ring.rows) continue;
        float* to = memory + place(ring, y, x, images) + (i64)image * ring.channels + channel;
        float positive = fabsf(value), bent = expm1f(-positive);
        if (sum.f[i] == CONCAT_ELU) {
            to[0] = value > 0 ? positive : bent;
            to[sum.channels] = value > 0 ? bent : positive;
        } else if (sum.f[i] == ELU) {
            to[0] = value > 0 ? value : bent;
        } else {
            to[0] = 0 > value ? 0 : value;
        }
    }
}
EXPORT(sum_taps)

// What the pixel sees of those up to it, where a sum is attention's: a thread takes a head of an image.
KERNEL see(
    float* memory, const int* at, i64 start, int scale, int columns, int channels, int heads,
    Ring queries, Ring keys_values, int images
) {
    i64 number = index();
    if (number >= (i64)images * heads) return;
    int head = number % heads, image = number / heads, width = channels / heads;
    int y = at[0] >> scale, x = at[1] >> scale;
    float factor = 1 / sqrtf((float)width);
    const float* query =
        memory + place(queries, y, x, images) + (i64)image * queries.channels + head * width;
    float* to = memory + start * images + ((i64)x * images + image) * columns + head * width;
    int last = y * keys_values.width + x;
    LogSum total = {-INFINITY, 0};
    for (int c = 0; c < width; c++) to[c] = 0;
    for (int again = 0; again < 2; again++) {
        for (int j = 0; j <= last; j++) {
            int row = j / keys_values.width, column = j % keys_values.width;
            const float* key = memory + place(keys_values, row, column, images) +
                               (i64)image * keys_values.channels + head * width;
            float found = factor * product(query, key, width);
            if (!again) {
                take(&total, found);
                continue;
            }
            float share = expf(found - total.max) / total.sum;
            for (int c = 0; c < width; c++) to[c] += share * key[channels + c];
        }
    }
}
EXPORT(see)
