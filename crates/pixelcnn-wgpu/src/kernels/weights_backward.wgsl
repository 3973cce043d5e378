// The gradient by V.

fn run(at: u32) {
    let output = at / arg.inner % arg.outputs;
    d_v[at] = factors[2u * output] * d_weight[in_weight(at)] + factors[2u * output + 1u] * v[at];
}
