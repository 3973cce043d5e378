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

// A head of a pixel: where its channels begin among those of all queries, its query, and the first
// pixel's key.
struct Head {
    i64 own;
    const float *query, *keys;
    int channels, width, last;
    float scale;
};

__device__ Head head_of(const float* queries, const float* keys_values, Heads heads, i64 at) {
    Head head;
    i64 pixel = at / heads.heads;
    head.channels = heads.channels;
    head.width = heads.channels / heads.heads;
    head.last = pixel % heads.pixels;
    int first = at % heads.heads * head.width;
    head.own = pixel * heads.channels + first;
    head.query = queries + head.own;
    head.keys = keys_values + (pixel - head.last) * 2 * heads.channels + first;
    head.scale = 1 / sqrtf((float)head.width);
    return head;
}

__device__ const float* key_of(Head head, int pixel) {
    return head.keys + (i64)pixel * 2 * head.channels;
}

__device__ float scaled_product(Head head, int pixel) {
    return head.scale * product(head.query, key_of(head, pixel), head.width);
}

// The logarithm of the sum of a pixel's exponentials.
__device__ float log_total(Head head) {
    LogSum total = {-INFINITY, 0};
    for (int j = 0; j <= head.last; j++) take(&total, scaled_product(head, j));
    return total.max + logf(total.sum);
}

KERNEL attend(const float* queries, const float* keys_values, float* seen, Heads heads) {
    i64 at = index();
    if (at >= heads.count) return;
    Head head = head_of(queries, keys_values, heads, at);
    float total = log_total(head);
    float* to = seen + head.own;
    for (int c = 0; c < head.width; c++) to[c] = 0;
    for (int j = 0; j <= head.last; j++) {
        const float* value = key_of(head, j) + head.channels;
        float share = expf(scaled_product(head, j) - total);
        for (int c = 0; c < head.width; c++) to[c] += share * value[c];
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
    Head head = head_of(queries, keys_values, heads, at);
    const float* dy = d_seen + head.own;
    float total = log_total(head), mean = 0;
    for (int j = 0; j <= head.last; j++) {
        float share = expf(scaled_product(head, j) - total);
        mean += share * product(dy, key_of(head, j) + head.channels, head.width);
    }
    float* to = d_queries + head.own;
    if (!accumulate)
        for (int c = 0; c < head.width; c++) to[c] = 0;
    for (int j = 0; j <= head.last; j++) {
        const float* key = key_of(head, j);
        float share = expf(scaled_product(head, j) - total);
        float by_share = product(dy, key + head.channels, head.width);
        float by_product = share * (by_share - mean) * head.scale;
        for (int c = 0; c < head.width; c++) to[c] += by_product * key[c];
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
