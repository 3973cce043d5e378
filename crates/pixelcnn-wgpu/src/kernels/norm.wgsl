// Weight normalisation (Salimans & Kingma, 2016): pixelcnn-core's kernels/weight_norm.rs says what is computed. V is
// [rows, outputs, inner]; weights are [coarse channels, taps, fine channels]. A convolution's V is
// [taps, inputs, outputs], a transposed one's [taps, outputs, inputs].

// Where a value of V lies in the weight: a transposed convolution's outputs are its fine channels.
fn in_weight(at: u32) -> u32 {
    let inner = at % arg.inner;
    let output = at / arg.inner % arg.outputs;
    let row = at / arg.inner / arg.outputs;
    if arg.transposed > 0u {
        return (inner * arg.rows + row) * arg.outputs + output;
    }
    return output * arg.rows + row;
}

fn length_of(square: f32) -> f32 {
    return sqrt(max(square, arg.floor));
}
