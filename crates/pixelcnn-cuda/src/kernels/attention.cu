// Causal self-attention: pixelcnn-core's kernels/attention.rs says what it is. Queries and what is seen
// are [images, pixels, channels], keys and values [images, pixels, 2 * channels]. A thread takes a head of
// a pixel, of which there are `count`; sums are in the pixels' order.

struct Heads {
    i64 count;
    int pixels, channels, heads;
};

__device__ float product(const float* a, const float* b, int width) {
    float sum = 0;
    for (int c = 0; c < width; c++) sum += a[c] * b[c];
    return sum;
}

// The logarithm of the sum of a pixel's exponentials.
__device__ float log_total(const float* query, const float* keys, int last, int stride, int width) {
    float scale = 1 / sqrtf((float)width);
    LogSum total = {-INFINITY, 0};
    for (int j = 0; j <= last; j++)
        take(&total, scale * product(query, keys + (i64)j * stride, width));
    return total.max + logf(total.sum);
}

KERNEL attend(const float* queries, const float* keys_values, float* seen, Heads heads) {
    i64 at = index();
    if (at >= heads.count) return;
    int channels = heads.channels, width = channels / heads.heads, stride = 2 * channels;
    int head = at % heads.heads;
    i64 pixel = at / heads.heads;
    int last = pixel % heads.pixels;
    const float* query = queries + pixel * channels + head * width;
    const float* keys = keys_values + (pixel - last) * stride + head * width;
    float scale = 1 / sqrtf((float)width), total = log_total(query, keys, last, stride, width);
    float* to = seen + pixel * channels + head * width;
    for (int c = 0; c < width; c++) to[c] = 0;
    for (int j = 0; j <= last; j++) {
        const float* key = keys + (i64)j * stride;
        float share = expf(scale * product(query, key, width) - total);
        for (int c = 0; c < width; c++) to[c] += share * key[channels + c];
    }
}
EXPORT(attend)

// The gradient by the queries; keeps in `totals` [2, count] what that by keys and values takes.
KERNEL attend_backward_queries(
    const float* queries, const float* keys_values, const float* d_seen, float* d_queries,
    float* totals, Heads heads, int accumulate
) {
    i64 at = index();
    if (at >= heads.count) return;
    int channels = heads.channels, width = channels / heads.heads, stride = 2 * channels;
    int head = at % heads.heads;
    i64 pixel = at / heads.heads;
    int last = pixel % heads.pixels;
    const float* query = queries + pixel * channels + head * width;
    const float* keys = keys_values + (pixel - last) * stride + head * width;
    const float* dy = d_seen + pixel * channels + head * width;
    float scale = 1 / sqrtf((float)width), total = log_total(query, keys, last, stride, width);
    float mean = 0;
    for (int j = 0; j <= last; j++) {
        const float* key = keys + (i64)j * stride;
        float share = expf(scale * product(query, key, width) - total);
        mean += share * product(dy, key + channels, width);
    }
    float* to = d_queries + pixel * channels + head * width;
    if (!accumulate)
        for (int c = 0; c < width; c++) to[c] = 0;
    for (int j = 0; j <= last; j++) {
        const float* key = keys + (i64)j * stride;
        float share = expf(scale * product(query, key, width) - total);
        float by_product = share * (product(dy, key + channels, width) - mean) * scale;
        for (int c = 0; c < width; c++) to[c] += by_product * key[c];
    }
    totals[at] = total;
    totals[heads.count + at] = mean;
}
EXPORT(attend_backward_queries)

KERNEL attend_backward_keys_values(
    const float* queries, const float* keys_values, const float* d_seen, const float* totals,
    float* d_keys_values, Heads heads, int accumulate
) {
    i64 at = index();
    if (at >= heads.count) return;
    int channels = heads.channels, width = channels / heads.heads;
    int head = at % heads.heads;
    i64 pixel = at / heads.heads;
    const float* key = keys_values + pixel * 2 * channels + head * width;
    float scale = 1 / sqrtf((float)width);
    float* to = d_keys_values + pixel * 2 * channels + head * width;
    if (!accumulate)
        for (int c = 0; c < width; c++) to[c] = to[channels + c] = 0;
    for (int i = pixel % heads.pixels; i < heads.pixels; i++) {
        i64 other = pixel - pixel % heads.pixels + i, number = other * heads.heads + head;
        const float* query = queries + other * channels + head * width;
        const float* dy = d_seen + other * channels + head * width;
        float share = expf(scale * product(query, key, width) - totals[number]);
        float by_share = product(dy, key + channels, width);
        float by_product = share * (by_share - totals[heads.count + number]) * scale;
        for (int c = 0; c < width; c++) {
            to[c] += by_product * query[c];
            to[channels + c] += share * dy[c];
        }
    }
}
EXPORT(attend_backward_keys_values)
