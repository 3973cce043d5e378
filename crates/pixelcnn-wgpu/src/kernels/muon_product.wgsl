// out = scale * x + by_product * x * factor, where the factor is [shorter, shorter] and x [rows, shorter].

const LEFT_DEEP = true;
const RIGHT_DEEP = false;

fn left_at(row: u32, deep: u32) -> f32 {
    return x[row * arg.shorter + deep];
}

fn right_at(deep: u32, column: u32) -> f32 {
    return factor[deep * arg.shorter + column];
}

fn put(row: u32, column: u32, size: vec2u, sum: f32) {
    let at = row * size.y + column;
    out[at] = arg.scale * x[at] + arg.by_product * sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.rows, arg.shorter);
    let first = vec2u(group.y * TILE, group.x * TILE);
    product(first, size, vec2u(0u, arg.shorter), lane);
}
