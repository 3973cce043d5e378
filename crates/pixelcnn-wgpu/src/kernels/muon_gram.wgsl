// transposed Y * Y, [shorter, shorter].

const LEFT_DEEP = false;
const RIGHT_DEEP = false;

fn left_at(row: u32, deep: u32) -> f32 {
    return y[deep * arg.shorter + row];
}

fn right_at(deep: u32, column: u32) -> f32 {
    return y[deep * arg.shorter + column];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let size = vec2u(arg.shorter);
    let first = vec2u(group.y * TILE, group.x * TILE);
    let sums = product(first, size, vec2u(0u, arg.longer), lane);
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            let row = first.x + lane / 16u + 16u * i;
            let column = first.y + lane % 16u + 16u * j;
            if row < size.x && column < size.y { gram[row * size.y + column] = sums[i][j]; }
        }
    }
}
