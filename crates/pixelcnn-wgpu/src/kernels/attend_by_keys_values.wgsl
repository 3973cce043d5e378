// The gradient by keys and values: of all pixels that look at one, in their order.

fn run(at: u32) {
    let width = arg.channels / arg.heads;
    let head = at % arg.heads;
    let pixel = at / arg.heads;
    let first = pixel - pixel % arg.pixels;
    let key = pixel * 2u * arg.channels + head * width;
    if arg.accumulate == 0u {
        for (var c = 0u; c < width; c++) {
            d_keys_values[key + c] = 0.0;
            d_keys_values[key + arg.channels + c] = 0.0;
        }
    }
    for (var i = pixel % arg.pixels; i < arg.pixels; i++) {
        let other = (first + i) * arg.heads + head;
        let query = own_of(other);
        let share = exp(scaled_product(query, key) - totals[other]);
        var by_share = 0.0;
        for (var c = 0u; c < width; c++) {
            by_share += d_seen[query + c] * keys_values[key + arg.channels + c];
        }
        let by_product = share * (by_share - totals[arg.values + other]) / sqrt(f32(width));
        for (var c = 0u; c < width; c++) {
            d_keys_values[key + c] += by_product * queries[query + c];
            d_keys_values[key + arg.channels + c] += share * d_seen[query + c];
        }
    }
}
