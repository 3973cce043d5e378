// The gradient by the bias: the sums of `d_to` [pixels, channels] over a part of the pixels, for each channel.

var<workgroup> lanes: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let channel = group.x * 32u + lane % 32u;
    let end = min(arg.pixels, (group.y + 1u) * arg.part);
    var sum = 0.0;
    if channel < arg.channels {
        for (var pixel = group.y * arg.part + lane / 32u; pixel < end; pixel += 8u) {
            sum += d_to[pixel * arg.channels + channel];
        }
    }
    lanes[lane] = sum;
    workgroupBarrier();
    if lane < 32u && channel < arg.channels {
        for (var other = 1u; other < 8u; other++) {
            sum += lanes[other * 32u + lane];
        }
        sums_of_parts[group.y * arg.channels + channel] = sum;
    }
}
