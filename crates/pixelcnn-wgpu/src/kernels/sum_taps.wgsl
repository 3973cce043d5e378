// Sums taps at pixels of a row, and makes the values of complete sums: a channel of an image's pixel each. A
// ring that there is not is NONE.

fn bend_into(ring: u32, f: u32, y: i32, x: i32, image: u32, channel: u32, value: f32) {
    if ring == NONE { return; }
    let to = place(ring, y, x, image) + channel;
    let positive = abs(value);
    let bent = expm1_of(-positive);
    if f == 0u {
        memory[to] = select(bent, positive, value > 0.0);
        memory[to + arg.channels] = select(positive, bent, value > 0.0);
    } else if f == 1u {
        memory[to] = select(bent, value, value > 0.0);
    } else {
        memory[to] = select(value, 0.0, 0.0 > value);
    }
}

fn run(at: u32) {
    let channel = at % arg.channels;
    let image = at / arg.channels % arg.images;
    let pixel = at / arg.channels / arg.images;
    let y = i32(due[0] >> arg.scale);
    let x = i32(select(due[1] >> arg.scale, arg.first + pixel * arg.step, arg.step > 0u));
    let half = arg.panels * PANEL;
    let own = (arg.start * arg.images) + (u32(x) * arg.images + image) * half * (1u + arg.gated);
    let bias = arg.class_bias * labels[image];
    var sums = vec2f(0.0);
    for (var h = 0u; h <= arg.gated; h++) {
        let column = h * half + channel;
        var value = 0.0;
        if arg.begun > 0u { value = memory[own + column]; } else { value = weights[bias + column]; }
        var weight = arg.weights_at + column / PANEL * arg.inputs * PANEL + column % PANEL;
        for (var tap = arg.first_tap; tap < arg.end_tap; tap++) {
            let ring = taps[tap * TAP];
            let tap_y = ((y << arg.scale) >> scale_of(ring)) + bitcast<i32>(taps[tap * TAP + 1u]);
            let tap_x = ((x << arg.scale) >> scale_of(ring)) + bitcast<i32>(taps[tap * TAP + 2u]);
            let given = place(ring, tap_y, tap_x, image);
            for (var i = 0u; i < taps[tap * TAP + 3u]; i++) {
                value += memory[given + i] * weights[weight];
                weight += PANEL;
            }
        }
        // A component that is named: one by its number can't be written everywhere.
        if h == 0u { sums.x = value; } else { sums.y = value; }
        if arg.complete == 0u { memory[own + column] = value; }
    }
    if arg.complete == 0u { return; }
    var value = sums.x;
    if arg.gated > 0u { value = memory[place(arg.residual, y, x, image) + channel] + sums.x * sigmoid(sums.y); }
    if arg.value != NONE { memory[place(arg.value, y, x, image) + channel] = value; }
    bend_into(arg.bent_1, arg.f_1, y, x, image, channel, value);
    bend_into(arg.bent_2, arg.f_2, y, x, image, channel, value);
}
