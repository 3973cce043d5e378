// Two maps that lie over each other: tap (ky, kx) joins the coarser one's pixel (y, x) with the finer one's at
// (y * stride + ky - offset_y, x * stride + kx - offset_x). See Window in pixelcnn-core's network.rs. The weight
// is [coarse channels, taps, fine channels].

// The finer map's pixel under a tap of the coarser one's, or NONE where there is none.
fn finer(pixel: u32, tap: u32) -> u32 {
    let x = i32(pixel % arg.coarse_w * arg.stride + tap % arg.kernel_w) - i32(arg.offset_x);
    let y = i32(pixel / arg.coarse_w % arg.coarse_h * arg.stride + tap / arg.kernel_w) - i32(arg.offset_y);
    if x < 0 || y < 0 || x >= i32(arg.fine_w) || y >= i32(arg.fine_h) {
        return NONE;
    }
    let image = pixel / (arg.coarse_w * arg.coarse_h);
    return (image * arg.fine_h + u32(y)) * arg.fine_w + u32(x);
}

// And the other way.
fn coarser(pixel: u32, tap: u32) -> u32 {
    let x = i32(pixel % arg.fine_w + arg.offset_x) - i32(tap % arg.kernel_w);
    let y = i32(pixel / arg.fine_w % arg.fine_h + arg.offset_y) - i32(tap / arg.kernel_w);
    let stride = i32(arg.stride);
    if x < 0 || y < 0 || x % stride != 0 || y % stride != 0 {
        return NONE;
    }
    let to = vec2u(u32(x), u32(y)) / arg.stride;
    if to.x >= arg.coarse_w || to.y >= arg.coarse_h {
        return NONE;
    }
    let image = pixel / (arg.fine_w * arg.fine_h);
    return (image * arg.coarse_h + to.y) * arg.coarse_w + to.x;
}
