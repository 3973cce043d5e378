// The gradient by the bias of an embedding, which every pixel has: the sums of the rows of the gradient by the weight.

fn run(at: u32) {
    var sum = 0.0;
    for (var code = 0u; code < arg.codes; code++) {
        sum += d_weight[at * arg.codes + code];
    }
    d_bias[at] = sum;
}
