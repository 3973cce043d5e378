// The gradient by the weight, given the two maps, one of which is a gradient itself: a part of the pixels for
// each group.z, with sums of its own.

const LEFT_DEEP = false;
const RIGHT_DEEP = false;

fn left_at(row: u32, deep: u32) -> f32 {
    return coarse[deep * arg.coarse_c + row];
}

fn right_at(deep: u32, column: u32) -> f32 {
    let given = finer(deep, column / arg.fine_c);
    if given == NONE {
        return 0.0;
    }
    return fine[given * arg.fine_c + column % arg.fine_c];
}

var<private> part: u32;

fn put(row: u32, column: u32, size: vec2u, sum: f32) {
    sums_of_parts[(part * size.x + row) * size.y + column] = sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.coarse_c, arg.kernel_h * arg.kernel_w * arg.fine_c);
    let first = vec2u(group.y * TILE, group.x * TILE);
    let pixels = arg.images * arg.coarse_h * arg.coarse_w;
    let own = arg.group + group.z;
    // What is private counts as another one for each invocation; the depth must be the same for all.
    part = own;
    let depth = vec2u(own * arg.part, min(pixels, (own + 1u) * arg.part));
    product(first, size, depth, lane);
}
