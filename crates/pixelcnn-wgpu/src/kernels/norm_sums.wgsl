// Where the n-th value of an output is in V.
fn value_of(output: u32, n: u32) -> u32 {
    return (n / arg.inner * arg.outputs + output) * arg.inner + n % arg.inner;
}
