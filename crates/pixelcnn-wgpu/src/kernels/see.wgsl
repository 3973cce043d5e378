// What the pixel sees of those up to it, where a sum is attention's: a head of an image each.

fn run(at: u32) {
    let head = at % arg.heads;
    let image = at / arg.heads;
    let width = arg.channels / arg.heads;
    let y = due[0] >> arg.scale;
    let x = due[1] >> arg.scale;
    let factor = 1.0 / sqrt(f32(width));
    let query = place(arg.queries, i32(y), i32(x), image) + head * width;
    let to = arg.start * arg.images + (x * arg.images + image) * arg.columns + head * width;
    let columns = rings[arg.keys_values * RING + 4u];
    var total = NOTHING;
    for (var c = 0u; c < width; c++) { memory[to + c] = 0.0; }
    for (var again = 0u; again < 2u; again++) {
        let log_total = log_of(total);
        for (var j = 0u; j <= y * columns + x; j++) {
            let key = place(arg.keys_values, i32(j / columns), i32(j % columns), image) + head * width;
            var found = 0.0;
            for (var c = 0u; c < width; c++) { found += memory[query + c] * memory[key + c]; }
            found *= factor;
            if again == 0u {
                total = with_term(total, found);
                continue;
            }
            let share = exp(found - log_total);
            for (var c = 0u; c < width; c++) { memory[to + c] += share * memory[key + arg.channels + c]; }
        }
    }
}
