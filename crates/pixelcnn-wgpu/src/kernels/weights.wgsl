// The weight.

fn run(at: u32) {
    made[in_weight(at)] = v[at] * scale[at / arg.inner % arg.outputs];
}
