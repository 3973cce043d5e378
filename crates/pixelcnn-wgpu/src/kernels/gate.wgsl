// y = x + a sigmoid(b), with the halves of c2, to which bias and conditional weights are added.

fn added(image: u32, channel: u32) -> f32 {
    var sum = bias[channel];
    for (var i = 0u; i < 2u && arg.conditional > 0u; i++) {
        let row = conditions[2u * image + i];
        if row != NONE { sum += hw[row * 2u * arg.channels + channel]; }
    }
    return sum;
}

fn run(at: u32) {
    let pixel = at / arg.channels;
    let channel = at % arg.channels;
    let image = pixel / arg.pixels_per_image;
    let place = pixel * 2u * arg.channels + channel;
    let a = c2[place] + added(image, channel);
    let b = c2[place + arg.channels] + added(image, arg.channels + channel);
    y[at] = x[at] + a * sigmoid(b);
}
