// Sums over an output's values of V, by a workgroup.

var<workgroup> lanes: array<vec2f, 256>;

fn total_of(sum: vec2f, lane: u32) -> vec2f {
    lanes[lane] = sum;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half /= 2u) {
        if lane < half { lanes[lane] += lanes[lane + half]; }
        workgroupBarrier();
    }
    return lanes[0];
}

// Where the n-th value of an output is in V.
fn value_of(output: u32, n: u32) -> u32 {
    return (n / arg.inner * arg.outputs + output) * arg.inner + n % arg.inner;
}
