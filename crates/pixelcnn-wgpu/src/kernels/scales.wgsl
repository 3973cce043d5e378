// g / ||V|| for each output, a workgroup each.

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32
) {
    let output = group.x + group.y * groups.x;
    if output >= arg.outputs { return; }
    var sum = 0.0;
    for (var n = lane; n < arg.rows * arg.inner; n += 256u) {
        let value = v[value_of(output, n)];
        sum += value * value;
    }
    let square = total_of(vec2f(sum, 0.0), lane).x;
    if lane == 0u { scale[output] = g[output] / length_of(square); }
}
