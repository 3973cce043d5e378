// The gradient by that weight: of the pixels that have its code, in their order.

fn run(at: u32) {
    let code = at / arg.outputs;
    let channel = at % arg.outputs;
    var sum = 0.0;
    for (var pixel = 0u; pixel < arg.pixels; pixel++) {
        if levels[pixel * arg.maps + arg.which] == code {
            sum += d_out[pixel * (arg.outputs + 1u) + channel];
        }
    }
    d_weight[channel * arg.codes + code] = sum;
}
