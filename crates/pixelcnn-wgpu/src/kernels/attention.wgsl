// Causal self-attention: pixelcnn-core's kernels/attention.rs says what it is. Queries and what is seen are
// [images, pixels, channels], keys and values [images, pixels, 2 * channels]. A head of a pixel by each
// invocation; sums are in the pixels' order.

// Where the channels of a head of a pixel begin among those of all queries.
fn own_of(at: u32) -> u32 {
    return at / arg.heads * arg.channels + at % arg.heads * (arg.channels / arg.heads);
}

// And the key of its image's pixel `j`; the value is `channels` behind it.
fn key_of(at: u32, j: u32) -> u32 {
    let pixel = at / arg.heads;
    let image = pixel - pixel % arg.pixels;
    return (image + j) * 2u * arg.channels + at % arg.heads * (arg.channels / arg.heads);
}

fn last_of(at: u32) -> u32 {
    return at / arg.heads % arg.pixels;
}

fn scaled_product(query: u32, key: u32) -> f32 {
    let width = arg.channels / arg.heads;
    var sum = 0.0;
    for (var c = 0u; c < width; c++) {
        sum += queries[query + c] * keys_values[key + c];
    }
    return sum / sqrt(f32(width));
}

// The logarithm of the sum of a pixel's exponentials.
fn log_total(at: u32) -> f32 {
    var total = NOTHING;
    for (var j = 0u; j <= last_of(at); j++) {
        total = with_term(total, scaled_product(own_of(at), key_of(at, j)));
    }
    return log_of(total);
}
