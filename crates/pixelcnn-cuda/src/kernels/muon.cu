// Muon's step: pixelcnn-core's kernels/muon.rs says what is computed. All matrices move together, each a
// blockIdx.z of its own, or blockIdx.y.

// A V that moves as a matrix: where it begins among all parameters, and its length as it is drawn.
struct Matrix {
    i64 at, rows, columns;
    double length;
};

// Blocks that share a matrix, each with a sum of its own.
#define SUMMED 32

// The gradient becomes what is to be made orthogonal, with a sum of its squares for each block.
KERNEL muon_momentum(
    const Rates* rates, const u32* flag, float* gradients, float* first, double* squares,
    const Matrix* matrices
) {
    __shared__ double sums[256];
    if (*flag) return;
    const Matrix* matrix = matrices + blockIdx.y;
    double sum = 0;
    i64 count = matrix->rows * matrix->columns;
    for (i64 n = index(); n < count; n += (i64)gridDim.x * blockDim.x) {
        i64 at = matrix->at + n;
        float mean = first[at] + rates->take_1 * (gradients[at] - first[at]);
        float ahead = mean + rates->take_1 * (gradients[at] - mean);
        first[at] = mean;
        gradients[at] = ahead;
        sum += (double)ahead * ahead;
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 other = 1; other < blockDim.x; other++) sum += sums[other];
    squares[blockIdx.y * SUMMED + blockIdx.x] = sum;
}
EXPORT_TOGETHER(muon_momentum)

// Scaled to norm 1, and on its side where it is wide: Y [longer, shorter].
KERNEL muon_scale(
    const float* gradients, const double* squares, float* y, double least_norm, const Matrix* matrices
) {
    const Matrix* matrix = matrices + blockIdx.y;
    double square = 0;
    for (int n = 0; n < SUMMED; n++) square += squares[blockIdx.y * SUMMED + n];
    double norm = sqrt(square);
    float scale = 1 / (norm > least_norm ? norm : least_norm);
    i64 rows = matrix->rows, columns = matrix->columns;
    for (i64 n = index(); n < rows * columns; n += (i64)gridDim.x * blockDim.x) {
        i64 to = rows < columns ? n % columns * rows + n / columns : n;
        y[matrix->at + to] = gradients[matrix->at + n] * scale;
    }
}
EXPORT(muon_scale)

// Rows and columns of the product that a block computes, 4 x 4 by each of 16 x 16 threads.
#define TILE 64
// And so much of the sums at a time.
#define DEEP 16

// Adds a tile of left * right, [rows, depth] and [depth, columns], to a thread's sums. The values of both
// are `row`s apart in their rows and `column`s in their columns; those beyond are zeros.
struct Operand {
    const float* values;
    i64 row, column;
};

__device__ void multiply(
    Operand left, Operand right, i64 rows, i64 columns, i64 depth, float (*a)[TILE], float (*b)[TILE],
    float (*sums)[4]
) {
    i64 row = (i64)blockIdx.y * TILE, column = (i64)blockIdx.x * TILE;
    int lane = threadIdx.x % 16, line = threadIdx.x / 16;
    for (i64 begin = 0; begin < depth; begin += DEEP) {
        // Neighbours among the threads read neighbours in memory.
        for (int n = threadIdx.x; n < DEEP * TILE; n += blockDim.x) {
            int side = left.row == 1 ? n % TILE : n / DEEP;
            int deep = left.row == 1 ? n / TILE : n % DEEP;
            bool in = row + side < rows && begin + deep < depth;
            a[deep][side] =
                in ? left.values[(row + side) * left.row + (begin + deep) * left.column] : 0;
            side = n % TILE;
            deep = n / TILE;
            in = column + side < columns && begin + deep < depth;
            b[deep][side] =
                in ? right.values[(begin + deep) * right.row + (column + side) * right.column] : 0;
        }
        __syncthreads();
        for (int deep = 0; deep < DEEP; deep++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    sums[i][j] += a[deep][line + 16 * i] * b[deep][lane + 16 * j];
        __syncthreads();
    }
}

// gram = transposed Y * Y, [shorter, shorter].
KERNEL muon_gram(const float* y, float* gram, const Matrix* matrices) {
    __shared__ float a[DEEP][TILE], b[DEEP][TILE];
    const Matrix* matrix = matrices + blockIdx.z;
    bool wide = matrix->rows < matrix->columns;
    i64 longer = wide ? matrix->columns : matrix->rows, shorter = wide ? matrix->rows : matrix->columns;
    // It is its own transpose: those above the diagonal are copied.
    if (blockIdx.x > blockIdx.y || (i64)blockIdx.y * TILE >= shorter) return;
    y += matrix->at;
    gram += matrix->at;
    float sums[4][4] = {};
    multiply({y, 1, shorter}, {y, shorter, 1}, shorter, shorter, longer, a, b, sums);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            i64 row = (i64)blockIdx.y * TILE + threadIdx.x / 16 + 16 * i;
            i64 column = (i64)blockIdx.x * TILE + threadIdx.x % 16 + 16 * j;
            if (row >= shorter || column > row) continue;
            gram[row * shorter + column] = sums[i][j];
            gram[column * shorter + row] = sums[i][j];
        }
}
EXPORT_TOGETHER(muon_gram)

// out = scale * x + by_product * x * factor, where the factor is [shorter, shorter] and x is too (`square`)
// or is Y.
KERNEL muon_product(
    const float* x, const float* factor, float* out, float scale, float by_product, int square,
    const Matrix* matrices
) {
    __shared__ float a[DEEP][TILE], b[DEEP][TILE];
    const Matrix* matrix = matrices + blockIdx.z;
    bool wide = matrix->rows < matrix->columns;
    i64 longer = wide ? matrix->columns : matrix->rows, shorter = wide ? matrix->rows : matrix->columns;
    i64 rows = square ? shorter : longer;
    if ((i64)blockIdx.x * TILE >= shorter || (i64)blockIdx.y * TILE >= rows) return;
    x += matrix->at;
    factor += matrix->at;
    out += matrix->at;
    float sums[4][4] = {};
    multiply({x, shorter, 1}, {factor, shorter, 1}, rows, shorter, shorter, a, b, sums);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            i64 row = (i64)blockIdx.y * TILE + threadIdx.x / 16 + 16 * i;
            i64 column = (i64)blockIdx.x * TILE + threadIdx.x % 16 + 16 * j;
            if (row >= rows || column >= shorter) continue;
            i64 at = row * shorter + column;
            out[at] = scale * x[at] + by_product * sums[i][j];
        }
}
EXPORT_TOGETHER(muon_product)

// Moves the parameters along Y, and the Polyak average towards them, unless the flag is up.
KERNEL muon(
    const Rates* rates, const u32* flag, float learning_rate, const float* y, float* parameters,
    float* average, const Matrix* matrices
) {
    if (*flag) return;
    const Matrix* matrix = matrices + blockIdx.y;
    i64 rows = matrix->rows, columns = matrix->columns;
    float rate = learning_rate * matrix->length;
    for (i64 n = index(); n < rows * columns; n += (i64)gridDim.x * blockDim.x) {
        i64 at = matrix->at + n;
        i64 from = rows < columns ? n % columns * rows + n / columns : n;
        float parameter = parameters[at] - rate * y[matrix->at + from];
        parameters[at] = parameter;
        average[at] += rates->take_average * (parameter - average[at]);
    }
}
EXPORT(muon)
