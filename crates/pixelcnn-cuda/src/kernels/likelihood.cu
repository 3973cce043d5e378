// The discretized mixture of logistics (paper, section 2.1): pixelcnn-core's likelihood/mod.rs says
// how a bin's mass keeps its digits.

#define LOG_SCALE_MIN -7.0f

struct Logistic {
    float log_prob;
    float by_mean;
    float by_log_scale;
};

// Log-probability of one value under one discretized logistic, and its derivatives.
__device__ Logistic logistic(float x, float mean, float log_scale) {
    bool floored = LOG_SCALE_MIN > log_scale;
    float floor = floored ? LOG_SCALE_MIN : log_scale;
    float inverse = expf(-floor);
    float centered = x - mean;
    float z = inverse * centered, d = inverse * (1.0f / 255);

    bool left = x < -0.999f, end = left || x > 0.999f;
    float sign = left ? -1 : 1;
    float t = inverse * (sign * centered - 1.0f / 255);
    float beyond = 0 > t ? 0 : t;

    float distance = end ? fabsf(t) : fabsf(z);
    float e = expf(-distance);
    float s = sinhf(0.5f * d);
    float sinh_d = 2 * s * sqrtf(1 + s * s);
    float base = (1 + e) * (1 + e);
    float mass = 2 * sinh_d * e;
    bool middle = mass <= 1e-5f * (base + 4 * s * s * e);
    if (middle) s = 0;
    float inverse_base = 1 / (end ? 1 + e : base + 4 * s * s * e);

    float factor = end || middle ? 1 : 2 * sinh_d;
    float offset = middle ? -floor - 4.8481164f : 0; // ln 127.5
    float outside = end ? -beyond : offset - distance;

    float by_t = -(t > 0 ? 1 : e) * inverse_base;
    float by_z = -copysignf((1 - e) * (1 + e) * inverse_base, z);
    float coth = middle ? 1 : d * (1 + 2 * s * s) / sinh_d;
    float by_log_width = middle ? 1 : coth - d * 2 * sinh_d * e * inverse_base;
    Logistic one;
    one.log_prob = outside + logf(factor * inverse_base);
    one.by_mean = -inverse * (end ? sign * by_t : by_z);
    one.by_log_scale = floored ? 0 : -(end ? t * by_t : z * by_z + by_log_width);
    return one;
}

// The logarithm of a sum of exponentials, a term at a time.
struct LogSum {
    float max;
    float sum;
};

__device__ void take(LogSum* all, float term) {
    if (term > all->max) {
        all->sum = all->sum * expf(all->max - term) + 1;
        all->max = term;
    } else {
        all->sum += expf(term - all->max);
    }
}

// Nats of every pixel, and the gradient by the logits unless that is null: a thread takes a pixel.
// `logits` are [pixels, components * (1 + channels * kinds)]: weights, then for each channel means,
// log-scales and with three channels coefficients.
KERNEL likelihood(
    const unsigned char* levels, const float* logits, float* nats, float* gradient, i64 pixels,
    int channels, int components
) {
    i64 pixel = index();
    if (pixel >= pixels) return;
    int width = components * (1 + channels * (channels == 3 ? 3 : 2));
    const float* prior = logits + pixel * width;
    const float* rest = prior + components;
    float* d_prior = gradient ? gradient + pixel * width : 0;
    float* d_rest = d_prior + components;
    float x[3];
    for (int c = 0; c < channels; c++) x[c] = (levels[pixel * channels + c] - 127.5f) / 127.5f;

    LogSum priors = {-INFINITY, 0}, posteriors = {-INFINITY, 0};
    for (int k = 0; k < components; k++) {
        const float* p = rest + k;
        int n = components;
        float log_prob;
        if (channels == 3) {
            float c0 = tanhf(p[2 * n]), c1 = tanhf(p[5 * n]), c2 = tanhf(p[8 * n]);
            Logistic r = logistic(x[0], p[0], p[n]);
            Logistic g = logistic(x[1], p[3 * n] + c0 * x[0], p[4 * n]);
            Logistic b = logistic(x[2], p[6 * n] + c1 * x[0] + c2 * x[1], p[7 * n]);
            log_prob = prior[k] + (r.log_prob + g.log_prob + b.log_prob);
            if (gradient) {
                float* d = d_rest + k;
                d[0] = r.by_mean;
                d[n] = r.by_log_scale;
                d[2 * n] = g.by_mean * x[0] * (1 - c0 * c0);
                d[3 * n] = g.by_mean;
                d[4 * n] = g.by_log_scale;
                d[5 * n] = b.by_mean * x[0] * (1 - c1 * c1);
                d[6 * n] = b.by_mean;
                d[7 * n] = b.by_log_scale;
                d[8 * n] = b.by_mean * x[1] * (1 - c2 * c2);
            }
        } else {
            Logistic one = logistic(x[0], p[0], p[n]);
            log_prob = prior[k] + one.log_prob;
            if (gradient) {
                d_rest[k] = one.by_mean;
                d_rest[n + k] = one.by_log_scale;
            }
        }
        if (gradient) d_prior[k] = log_prob;
        take(&priors, prior[k]);
        take(&posteriors, log_prob);
    }
    float log_prior = priors.max + logf(priors.sum);
    float log_posterior = posteriors.max + logf(posteriors.sum);
    nats[pixel] = log_prior - log_posterior;
    if (!gradient) return;
    for (int k = 0; k < components; k++) {
        float posterior = expf(d_prior[k] - log_posterior);
        d_prior[k] = expf(prior[k] - log_prior) - posterior;
        for (int i = k; i < width - components; i += components) d_rest[i] *= -posterior;
    }
}
EXPORT(likelihood)

// Nats of every pixel's code, and the gradient by the logits [pixels, codes] unless that is null: a thread
// takes a pixel.
KERNEL likelihood_of_codes(
    const unsigned char* images, const float* logits, float* nats, float* gradient, i64 pixels, int bytes,
    int codes
) {
    i64 pixel = index();
    if (pixel >= pixels) return;
    const float* own = logits + pixel * codes;
    u32 code = code_of(images, pixel, bytes, 0);
    LogSum all = {-INFINITY, 0};
    for (int k = 0; k < codes; k++) take(&all, own[k]);
    float total = all.max + logf(all.sum);
    nats[pixel] = total - own[code];
    if (!gradient) return;
    float* d = gradient + pixel * codes;
    for (int k = 0; k < codes; k++) d[k] = expf(own[k] - total) - (k == (int)code ? 1 : 0);
}
EXPORT(likelihood_of_codes)

// Nats of every image: a block adds an image's pixels up.
KERNEL sum_images(const float* nats, double* sums, i64 pixels_per_image) {
    __shared__ double partial[256];
    const float* own = nats + blockIdx.x * pixels_per_image;
    double sum = 0;
    for (i64 pixel = threadIdx.x; pixel < pixels_per_image; pixel += 256) sum += own[pixel];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (u32 half = 128; half; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}
EXPORT_TOGETHER(sum_images)
