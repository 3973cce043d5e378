// What is added to a channel of an image: the bias, and the rows of its conditions.
fn added(image: u32, channel: u32) -> f32 {
    var sum = bias[channel];
    for (var i = 0u; i < 2u && arg.conditional > 0u; i++) {
        let row = conditions[2u * image + i];
        if row != NONE { sum += hw[row * 2u * arg.channels + channel]; }
    }
    return sum;
}

