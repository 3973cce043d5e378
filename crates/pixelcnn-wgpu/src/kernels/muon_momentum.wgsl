// Muon's step: pixelcnn-core's kernels/muon.rs says what is computed. What is to be made orthogonal, Y [longer,
// shorter], on its side where the matrix is wide; and a sum of its squares for each workgroup.

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    if wrong[0] == 0u {
        for (var at = group.x * 256u + lane; at < arg.values; at += 256u * arg.groups) {
            let mean = first[at] + rates[0] * (gradient[at] - first[at]);
            let ahead = mean + rates[0] * (gradient[at] - mean);
            first[at] = mean;
            var to = at;
            if arg.rows < arg.columns { to = at % arg.columns * arg.rows + at / arg.columns; }
            y[to] = ahead;
            sum += ahead * ahead;
        }
    }
    let total = total_of(vec2f(sum, 0.0), lane).x;
    if lane == 0u { squares[group.x] = total; }
}
