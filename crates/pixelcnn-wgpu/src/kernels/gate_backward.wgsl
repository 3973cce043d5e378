// The gradient by c2, which it overwrites.

fn run(at: u32) {
    let pixel = at / arg.channels;
    let channel = at % arg.channels;
    let image = pixel / arg.pixels_per_image;
    let place = pixel * 2u * arg.channels + channel;
    let a = c2[place] + added(image, channel);
    let open = sigmoid(c2[place + arg.channels] + added(image, arg.channels + channel));
    c2[place] = dy[at] * open;
    c2[place + arg.channels] = dy[at] * a * (open * (1.0 - open));
}
