// Moves the parameters along Y, and the Polyak average towards them, unless the flag is up. `rates` are Adam's, and
// behind them the learning rate.

fn run(at: u32) {
    if wrong[0] > 0u { return; }
    var given = at;
    if arg.rows < arg.columns { given = at % arg.columns * arg.rows + at / arg.columns; }
    let moved = parameter[at] - rates[6] * arg.length * y[given];
    parameter[at] = moved;
    average[at] += rates[5] * (moved - average[at]);
}
