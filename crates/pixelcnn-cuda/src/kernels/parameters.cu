// Weight normalisation (Salimans & Kingma, 2016) and the optimiser: pixelcnn-core's
// kernels/weight_norm.rs and kernels/adam.rs say what is computed.

// Where the arrays of a weight-normalised layer begin among all parameters, and their shape: V is
// [rows, outputs, inner]. A convolution's V is [taps, inputs, outputs], a transposed one's
// [taps, outputs, inputs]. Weights are [coarse channels, taps, fine channels], see convolution.cu.
struct Norm {
    i64 v, g, bias;
    // The number of its first output among all layers' outputs.
    i64 first;
    // Whether the weight is in single precision, and not as maps are.
    i64 wide;
    i64 transposed;
    i64 rows, outputs, inner;
    double floor;
};

// Where a value of V lies in the weight: a transposed convolution's outputs are its fine channels.
__device__ i64 in_weight(const Norm* norm, i64 row, i64 output, i64 inner) {
    return norm->transposed ? (inner * norm->rows + row) * norm->outputs + output
                            : output * norm->rows + row;
}

// For each output of each layer, what W and the gradients take from the sums over V: a block of
// 32 x 8 threads takes 32 outputs of the layer blockIdx.y.
__device__ double sum_rows(const float* v, const float* w, const Norm* norm, double (*sums)[32]) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 32;
    i64 output = blockIdx.x * 32 + lane;
    double sum = 0;
    if (output < norm->outputs) {
        for (i64 row = first; row < norm->rows; row += 8) {
            for (i64 inner = 0; inner < norm->inner; inner++) {
                float other = w ? w[in_weight(norm, row, output, inner)]
                                : v[(row * norm->outputs + output) * norm->inner + inner];
                sum += (double)v[(row * norm->outputs + output) * norm->inner + inner] * other;
            }
        }
    }
    sums[first][lane] = sum;
    __syncthreads();
    if (first == 0) {
        for (int other = 1; other < 8; other++) sum += sums[other][lane];
    }
    __syncthreads();
    return sum;
}

// g / ||V|| for each output, in the order of the layers.
KERNEL scales(const float* parameters, float* scales, const Norm* norms) {
    __shared__ double sums[8][32];
    const Norm* norm = norms + blockIdx.y;
    if (blockIdx.x * 32 >= norm->outputs) return;
    double square = sum_rows(parameters + norm->v, 0, norm, sums);
    int output = blockIdx.x * 32 + threadIdx.x;
    if (threadIdx.x >= 32 || output >= norm->outputs) return;
    double length = sqrt(square > norm->floor ? square : norm->floor);
    scales[norm->first + output] = parameters[norm->g + output] / length;
}
EXPORT_TOGETHER(scales)

// The weights, each where its V is among the parameters: a thread takes a value.
KERNEL weights(const float* parameters, const float* scales, float* weights, const Norm* norms) {
    const Norm* norm = norms + blockIdx.y;
    i64 count = norm->rows * norm->outputs * norm->inner;
    for (i64 at = index(); at < count; at += (i64)gridDim.x * blockDim.x) {
        i64 inner = at % norm->inner, output = at / norm->inner % norm->outputs;
        i64 row = at / norm->inner / norm->outputs;
        float value = parameters[norm->v + at] * scales[norm->first + output];
        i64 to = in_weight(norm, row, output, inner);
        // Each begins where V does, in bytes.
        float* wide = weights + norm->v;
        if (norm->wide) wide[to] = value;
        else put(((map*)wide)[to], value);
    }
}
EXPORT(weights)

// The gradients by g and by the bias, and for each output the factors of W's gradient and of V in V's
// gradient. Those by the weights and biases are in one array.
KERNEL scales_backward(
    const float* parameters, const float* d_weights, float* gradients, float* by_weight, float* by_v,
    const Norm* norms
) {
    __shared__ double sums[8][32];
    const Norm* norm = norms + blockIdx.y;
    if (blockIdx.x * 32 >= norm->outputs) return;
    const float* v = parameters + norm->v;
    double square = sum_rows(v, 0, norm, sums);
    double product = sum_rows(v, d_weights + norm->v, norm, sums);
    int output = blockIdx.x * 32 + threadIdx.x;
    if (threadIdx.x >= 32 || output >= norm->outputs) return;
    double length = sqrt(square > norm->floor ? square : norm->floor);
    double scale = parameters[norm->g + output] / length;
    gradients[norm->g + output] = product / length;
    gradients[norm->bias + output] = d_weights[norm->bias + output];
    by_weight[norm->first + output] = scale;
    // Below the floor the length is constant.
    by_v[norm->first + output] = square > norm->floor ? -scale * (product / square) : 0;
}
EXPORT_TOGETHER(scales_backward)

KERNEL weights_backward(
    const float* parameters, const float* d_weights, const float* by_weight, const float* by_v,
    float* gradients, const Norm* norms
) {
    const Norm* norm = norms + blockIdx.y;
    i64 count = norm->rows * norm->outputs * norm->inner;
    for (i64 at = index(); at < count; at += (i64)gridDim.x * blockDim.x) {
        i64 inner = at % norm->inner, output = at / norm->inner % norm->outputs;
        i64 row = at / norm->inner / norm->outputs;
        float by = d_weights[norm->v + in_weight(norm, row, output, inner)];
        gradients[norm->v + at] =
            by_weight[norm->first + output] * by + by_v[norm->first + output] * parameters[norm->v + at];
    }
}
EXPORT(weights_backward)

// Raises the flag where a value is not a number or infinite. As a float it is no number then.
KERNEL find_wrong(const float* values, i64 count, u32* flag) {
    i64 at = index();
    if (at < count && !(fabsf(values[at]) <= 3.4028235e38f)) *flag = 0x7fc00000;
}
EXPORT(find_wrong)

struct Rates {
    float take_1, take_2, rate, correction_2, epsilon, take_average;
};

// Some of all parameters.
struct Span {
    i64 start, count;
};

// Adam's step and the Polyak average, unless the flag is up: a thread takes some values of the span
// blockIdx.y.
KERNEL adam(
    const Rates* rates, const u32* flag, float* parameters, const float* gradients, float* first,
    float* second, float* average, const Span* spans
) {
    if (*flag) return;
    const Span* span = spans + blockIdx.y;
    i64 end = span->start + span->count;
    for (i64 at = span->start + index(); at < end; at += (i64)gridDim.x * blockDim.x) {
        float gradient = gradients[at];
        float mean = first[at] + rates->take_1 * (gradient - first[at]);
        float square = second[at] + rates->take_2 * (gradient * gradient - second[at]);
        float root = sqrtf(square * rates->correction_2 + rates->epsilon);
        float parameter = parameters[at] - rates->rate * mean / root;
        first[at] = mean;
        second[at] = square;
        parameters[at] = parameter;
        average[at] += rates->take_average * (parameter - average[at]);
    }
}
EXPORT(adam)
