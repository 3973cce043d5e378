// The sum over a workgroup of what each of its members has.

var<workgroup> lanes: array<vec2f, 256>;

fn total_of(sum: vec2f, lane: u32) -> vec2f {
    lanes[lane] = sum;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half /= 2u) {
        if lane < half { lanes[lane] += lanes[lane + half]; }
        workgroupBarrier();
    }
    return lanes[0];
}
