// The columns of a weight [outputs, codes] for the pixels' codes, with its bias, and a one behind each.

fn run(at: u32) {
    let pixel = at / (arg.outputs + 1u);
    let channel = at % (arg.outputs + 1u);
    if channel == arg.outputs {
        out[at] = 1.0;
    } else {
        let code = levels[pixel * arg.maps + arg.which];
        out[at] = weight[channel * arg.codes + code] + bias[channel];
    }
}
