// Adds a bias to every pixel.

fn run(at: u32) {
    to[at] += bias[at % arg.channels];
}
