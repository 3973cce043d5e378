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

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.coarse_c, arg.kernel_h * arg.kernel_w * arg.fine_c);
    let first = vec2u(group.y * TILE, group.x * TILE);
    let pixels = arg.images * arg.coarse_h * arg.coarse_w;
    let part = arg.group + group.z;
    let depth = vec2u(part * arg.part, min(pixels, (part + 1u) * arg.part));
    let sums = product(first, size, depth, lane);
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            let row = first.x + lane / 16u + 16u * i;
            let column = first.y + lane % 16u + 16u * j;
            if row < size.x && column < size.y {
                sums_of_parts[(part * size.x + row) * size.y + column] = sums[i][j];
            }
        }
    }
}
