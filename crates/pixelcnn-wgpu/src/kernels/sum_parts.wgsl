// Adds up the parts [parts, values].

fn run(at: u32) {
    var sum = 0.0;
    for (var part = 0u; part < arg.parts; part++) {
        sum += parts_of[part * arg.values + at];
    }
    total[at] = sum;
}
