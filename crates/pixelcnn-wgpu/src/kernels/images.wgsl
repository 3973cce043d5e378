// Images scaled to [-1, 1], the first `taken` of their channels or all and a plane of ones.

fn run(at: u32) {
    let pixel = at / arg.taken;
    let channel = at % arg.taken;
    if channel == arg.channels {
        out[at] = 1.0;
    } else {
        out[at] = (f32(levels[pixel * arg.channels + channel]) - 127.5) / 127.5;
    }
}
