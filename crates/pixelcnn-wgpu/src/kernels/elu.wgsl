fn run(at: u32) {
    let v = x[at];
    y[at] = select(expm1_of(-abs(v)), v, v > 0.0);
}
