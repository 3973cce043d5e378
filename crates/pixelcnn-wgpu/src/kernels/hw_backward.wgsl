// The gradient by the conditional weights [rows, channels], given that by c2: over all pixels of the images that
// a row is added to, in their order.

fn run(at: u32) {
    let row = at / arg.channels;
    let channel = at % arg.channels;
    var sum = 0.0;
    for (var image = 0u; image < arg.images; image++) {
        if conditions[2u * image] != row && conditions[2u * image + 1u] != row { continue; }
        var own = 0.0;
        for (var pixel = 0u; pixel < arg.pixels_per_image; pixel++) {
            own += d_c2[(image * arg.pixels_per_image + pixel) * arg.channels + channel];
        }
        sum += own;
    }
    d_hw[at] = sum;
}
