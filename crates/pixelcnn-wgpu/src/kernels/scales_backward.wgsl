// The gradient by g, and for each output the factors of W's gradient and of V in V's gradient.

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32
) {
    let output = group.x + group.y * groups.x;
    if output >= arg.outputs { return; }
    var sum = vec2f(0.0);
    for (var n = lane; n < arg.rows * arg.inner; n += 256u) {
        let at = value_of(output, n);
        sum += v[at] * vec2f(v[at], d_weight[in_weight(at)]);
    }
    let sums = total_of(sum, lane);
    if lane > 0u { return; }
    let length = length_of(sums.x);
    let scale = g[output] / length;
    d_g[output] = sums.y / length;
    // Below the floor the length is constant.
    var by_v = 0.0;
    if sums.x > arg.floor { by_v = -scale * (sums.y / sums.x); }
    factors[2u * output] = scale;
    factors[2u * output + 1u] = by_v;
}
