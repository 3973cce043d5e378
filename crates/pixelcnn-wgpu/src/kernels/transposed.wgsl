// The finer map of the coarser one: a transposed convolution, or the gradient by a convolution's input.

const LEFT_DEEP = true;
const RIGHT_DEEP = false;

fn left_at(row: u32, deep: u32) -> f32 {
    let given = coarser(row, deep / arg.coarse_c);
    if given == NONE {
        return 0.0;
    }
    return coarse[given * arg.coarse_c + deep % arg.coarse_c];
}

fn right_at(deep: u32, column: u32) -> f32 {
    let taps = arg.kernel_h * arg.kernel_w;
    return weight[(deep % arg.coarse_c * taps + deep / arg.coarse_c) * arg.fine_c + column];
}

fn put(row: u32, column: u32, size: vec2u, sum: f32) {
    let at = row * size.y + column;
    fine[at] = select(0.0, fine[at], arg.accumulate > 0u) + sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.images * arg.fine_h * arg.fine_w, arg.fine_c);
    let first = vec2u((arg.group + group.y) * TILE, group.x * TILE);
    let depth = vec2u(0u, arg.kernel_h * arg.kernel_w * arg.coarse_c);
    product(first, size, depth, lane);
}
