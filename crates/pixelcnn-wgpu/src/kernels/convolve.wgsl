// The coarser map of the finer one: a convolution, or the gradient by a transposed one's input.

const LEFT_DEEP = true;
const RIGHT_DEEP = true;

fn left_at(row: u32, deep: u32) -> f32 {
    let given = finer(row, deep / arg.fine_c);
    if given == NONE {
        return 0.0;
    }
    return fine[given * arg.fine_c + deep % arg.fine_c];
}

fn right_at(deep: u32, column: u32) -> f32 {
    return weight[column * (arg.kernel_h * arg.kernel_w * arg.fine_c) + deep];
}

fn put(row: u32, column: u32, size: vec2u, sum: f32) {
    let at = row * size.y + column;
    coarse[at] = select(0.0, coarse[at], arg.accumulate > 0u) + sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.images * arg.coarse_h * arg.coarse_w, arg.coarse_c);
    let first = vec2u((arg.group + group.y) * TILE, group.x * TILE);
    let depth = vec2u(0u, arg.kernel_h * arg.kernel_w * arg.fine_c);
    product(first, size, depth, lane);
}
