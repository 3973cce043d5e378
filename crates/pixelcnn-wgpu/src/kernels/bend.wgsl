// The nonlinearity with its dropout, of a map or of a part of a concatenation: `count` channels from `first` on of
// the concatenation's `of`. Before it the biases of the layers that made the map are added.

fn run(at: u32) {
    let pixel = at / arg.count;
    let own = at % arg.count;
    let channel = arg.first + own;
    var v = x[at];
    if arg.biases > 0u { v += bias_1[own]; }
    if arg.biases > 1u { v += bias_2[own]; }
    let positive = abs(v);
    let bent = expm1_of(-positive);
    if arg.f == CONCAT_ELU {
        let plus = pixel * 2u * arg.whole + channel;
        let minus = plus + arg.whole;
        y[plus] = select(bent, positive, v > 0.0) * kept(plus);
        y[minus] = select(positive, bent, v > 0.0) * kept(minus);
    } else {
        let to = pixel * arg.whole + channel;
        // What is no number goes through.
        y[to] = select(select(bent, v, v > 0.0), select(v, 0.0, 0.0 > v), arg.f == RELU) * kept(to);
    }
}
