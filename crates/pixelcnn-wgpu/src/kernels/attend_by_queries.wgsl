// The gradient by the queries; keeps in `totals` [2, values] what that by keys and values takes.

fn by_share(own: u32, value: u32) -> f32 {
    var sum = 0.0;
    for (var c = 0u; c < arg.channels / arg.heads; c++) {
        sum += d_seen[own + c] * keys_values[value + c];
    }
    return sum;
}

fn run(at: u32) {
    let width = arg.channels / arg.heads;
    let own = own_of(at);
    let total = log_total(at);
    var mean = 0.0;
    for (var j = 0u; j <= last_of(at); j++) {
        let key = key_of(at, j);
        mean += exp(scaled_product(own, key) - total) * by_share(own, key + arg.channels);
    }
    if arg.accumulate == 0u {
        for (var c = 0u; c < width; c++) { d_queries[own + c] = 0.0; }
    }
    for (var j = 0u; j <= last_of(at); j++) {
        let key = key_of(at, j);
        let share = exp(scaled_product(own, key) - total);
        let by_product = share * (by_share(own, key + arg.channels) - mean) / sqrt(f32(width));
        for (var c = 0u; c < width; c++) {
            d_queries[own + c] += by_product * keys_values[key + c];
        }
    }
    totals[at] = total;
    totals[arg.values + at] = mean;
}
