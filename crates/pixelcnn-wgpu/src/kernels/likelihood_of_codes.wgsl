// Nats of every pixel's code, and the gradient by the logits [pixels, codes] where `by_logits` says so.

fn run(at: u32) {
    let own = at * arg.codes;
    let code = levels[at * arg.maps];
    var all = NOTHING;
    for (var k = 0u; k < arg.codes; k++) { all = with_term(all, logits[own + k]); }
    let total = log_of(all);
    nats[at] = total - logits[own + code];
    if arg.by_logits == 0u { return; }
    for (var k = 0u; k < arg.codes; k++) {
        gradient[own + k] = exp(logits[own + k] - total) - select(0.0, 1.0, k == code);
    }
}
