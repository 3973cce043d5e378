// y = x + a sigmoid(b), with the halves of c2, to which bias and conditional weights are added.

fn run(at: u32) {
    let pixel = at / arg.channels;
    let channel = at % arg.channels;
    let image = pixel / arg.pixels_per_image;
    let place = pixel * 2u * arg.channels + channel;
    let a = c2[place] + added(image, channel);
    let b = c2[place + arg.channels] + added(image, arg.channels + channel);
    y[at] = x[at] + a * sigmoid(b);
}
