// Y scaled to norm 1.

fn run(at: u32) {
    var square = 0.0;
    for (var n = 0u; n < arg.groups; n++) { square += squares[n]; }
    y[at] *= 1.0 / max(sqrt(square), arg.least_norm);
}
