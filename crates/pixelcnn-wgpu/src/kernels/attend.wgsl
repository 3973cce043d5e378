fn run(at: u32) {
    let width = arg.channels / arg.heads;
    let own = own_of(at);
    let total = log_total(at);
    for (var c = 0u; c < width; c++) { seen[own + c] = 0.0; }
    for (var j = 0u; j <= last_of(at); j++) {
        let key = key_of(at, j);
        let share = exp(scaled_product(own, key) - total);
        for (var c = 0u; c < width; c++) {
            seen[own + c] += share * keys_values[key + arg.channels + c];
        }
    }
}
