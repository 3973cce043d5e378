// The gradient by what `bend` is given, from that by what it gives.

fn run(at: u32) {
    let pixel = at / arg.count;
    let own = at % arg.count;
    let channel = arg.first + own;
    var v = x[at];
    if arg.biases > 0u { v += bias_1[own]; }
    if arg.biases > 1u { v += bias_2[own]; }
    let slope = select(exp(-abs(v)), 0.0, arg.f == RELU);
    var through = 0.0;
    if arg.f == CONCAT_ELU {
        let plus = pixel * 2u * arg.whole + channel;
        let minus = plus + arg.whole;
        let by_plus = dy[plus] * kept(plus);
        let by_minus = dy[minus] * kept(minus);
        through = select(by_plus * slope - by_minus, by_plus - by_minus * slope, v > 0.0);
    } else {
        let given = pixel * arg.whole + channel;
        let by = dy[given] * kept(given);
        through = select(by * slope, by, v > 0.0);
    }
    dx[at] = select(0.0, dx[at], arg.accumulate > 0u) + through;
}
