// transposed Y * Y, [shorter, shorter].

const LEFT_DEEP = false;
const RIGHT_DEEP = false;

fn left_at(row: u32, deep: u32) -> f32 {
    return y[deep * arg.shorter + row];
}

fn right_at(deep: u32, column: u32) -> f32 {
    return y[deep * arg.shorter + column];
}

fn put(row: u32, column: u32, size: vec2u, sum: f32) {
    gram[row * size.y + column] = sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.shorter);
    let first = vec2u(group.y * TILE, group.x * TILE);
    product(first, size, vec2u(0u, arg.longer), lane);
}
