// A tile of a product, [rows, depth] times [depth, columns], by a workgroup of 16 x 16: each of its members
// has 4 x 4 of the tile's 64 x 64 sums. What is multiplied is told by left_at(row, deep) and
// right_at(deep, column) of the kernel; LEFT_DEEP and RIGHT_DEEP say whether neighbours in memory are
// neighbours in depth. What becomes of a sum, its put(row, column, size, sum) says.

const TILE = 64u;
const DEEP = 16u;

var<workgroup> left_tile: array<f32, 1024>;
var<workgroup> right_tile: array<f32, 1024>;

fn product(first: vec2u, size: vec2u, depth: vec2u, lane: u32) {
    var sums: array<vec4f, 4>;
    let line = lane / 16u;
    let column = lane % 16u;
    for (var begin = depth.x; begin < depth.y; begin += DEEP) {
        for (var n = lane; n < TILE * DEEP; n += 256u) {
            let by_depth = vec2u(n / DEEP, n % DEEP);
            let by_side = vec2u(n % TILE, n / TILE);
            let left = select(by_side, by_depth, LEFT_DEEP);
            let right = select(by_side, by_depth, RIGHT_DEEP);
            var value = 0.0;
            if first.x + left.x < size.x && begin + left.y < depth.y {
                value = left_at(first.x + left.x, begin + left.y);
            }
            left_tile[left.y * TILE + left.x] = value;
            value = 0.0;
            if first.y + right.x < size.y && begin + right.y < depth.y {
                value = right_at(begin + right.y, first.y + right.x);
            }
            right_tile[right.y * TILE + right.x] = value;
        }
        workgroupBarrier();
        for (var deep = 0u; deep < DEEP; deep++) {
            let l = deep * TILE + line;
            let r = deep * TILE + column;
            let right = vec4f(right_tile[r], right_tile[r + 16u], right_tile[r + 32u], right_tile[r + 48u]);
            sums[0] += left_tile[l] * right;
            sums[1] += left_tile[l + 16u] * right;
            sums[2] += left_tile[l + 32u] * right;
            sums[3] += left_tile[l + 48u] * right;
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            let row = first.x + line + 16u * i;
            let at = first.y + column + 16u * j;
            if row < size.x && at < size.y { put(row, at, size, sums[i][j]); }
        }
    }
}
