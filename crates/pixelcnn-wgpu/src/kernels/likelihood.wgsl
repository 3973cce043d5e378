// The discretized mixture of logistics (paper, section 2.1): pixelcnn-core's likelihood/mod.rs says how a bin's
// mass keeps its digits. Nats of every pixel, and the gradient by the logits where `by_logits` says so. `logits`
// are [pixels, components * (1 + channels * kinds)]: weights, then for each channel means, log-scales and with
// three channels coefficients.

const LOG_SCALE_MIN = -7.0;

// Log-probability of one value under one discretized logistic, and its derivatives by mean and log-scale.
fn logistic(x: f32, mean: f32, log_scale: f32) -> vec3f {
    let floored = LOG_SCALE_MIN > log_scale;
    let low = select(log_scale, LOG_SCALE_MIN, floored);
    let inverse = exp(-low);
    let centered = x - mean;
    let z = inverse * centered;
    let d = inverse * (1.0 / 255.0);

    let left = x < -0.999;
    let end = left || x > 0.999;
    let side = select(1.0, -1.0, left);
    let t = inverse * (side * centered - 1.0 / 255.0);
    let beyond = max(t, 0.0);

    let distance = select(abs(z), abs(t), end);
    let e = exp(-distance);
    var s = sinh_of(0.5 * d);
    let sinh_d = 2.0 * s * sqrt(1.0 + s * s);
    let base = (1.0 + e) * (1.0 + e);
    let mass = 2.0 * sinh_d * e;
    let middle = mass <= 1e-5 * (base + 4.0 * s * s * e);
    if middle { s = 0.0; }
    let inverse_base = 1.0 / select(base + 4.0 * s * s * e, 1.0 + e, end);

    let factor = select(2.0 * sinh_d, 1.0, end || middle);
    let offset = select(0.0, -low - 4.8481164, middle); // ln 127.5
    let outside = select(offset - distance, -beyond, end);

    let by_t = -select(e, 1.0, t > 0.0) * inverse_base;
    let by_z = -select(-1.0, 1.0, z >= 0.0) * (1.0 - e) * (1.0 + e) * inverse_base;
    let coth = select(d * (1.0 + 2.0 * s * s) / sinh_d, 1.0, middle);
    let by_log_width = select(coth - d * 2.0 * sinh_d * e * inverse_base, 1.0, middle);
    let by_log_scale = -select(z * by_z + by_log_width, t * by_t, end);
    return vec3f(
        outside + log(factor * inverse_base),
        -inverse * select(by_z, side * by_t, end),
        select(by_log_scale, 0.0, floored),
    );
}

fn run(at: u32) {
    let n = arg.components;
    let kinds = select(2u, 3u, arg.channels == 3u);
    let width = n * (1u + arg.channels * kinds);
    let prior = at * width;
    let rest = prior + n;
    var x: array<f32, 3>;
    for (var c = 0u; c < arg.channels; c++) {
        x[c] = (f32(levels[at * arg.channels + c]) - 127.5) / 127.5;
    }
    var priors = NOTHING;
    var posteriors = NOTHING;
    for (var k = 0u; k < n; k++) {
        let p = rest + k;
        var log_prob = logits[prior + k];
        if arg.channels == 3u {
            let c0 = tanh_of(logits[p + 2u * n]);
            let c1 = tanh_of(logits[p + 5u * n]);
            let c2 = tanh_of(logits[p + 8u * n]);
            let r = logistic(x[0], logits[p], logits[p + n]);
            let g = logistic(x[1], logits[p + 3u * n] + c0 * x[0], logits[p + 4u * n]);
            let b = logistic(x[2], logits[p + 6u * n] + c1 * x[0] + c2 * x[1], logits[p + 7u * n]);
            log_prob += r.x + g.x + b.x;
            if arg.by_logits > 0u {
                gradient[p] = r.y;
                gradient[p + n] = r.z;
                gradient[p + 2u * n] = g.y * x[0] * (1.0 - c0 * c0);
                gradient[p + 3u * n] = g.y;
                gradient[p + 4u * n] = g.z;
                gradient[p + 5u * n] = b.y * x[0] * (1.0 - c1 * c1);
                gradient[p + 6u * n] = b.y;
                gradient[p + 7u * n] = b.z;
                gradient[p + 8u * n] = b.y * x[1] * (1.0 - c2 * c2);
            }
        } else {
            let one = logistic(x[0], logits[p], logits[p + n]);
            log_prob += one.x;
            if arg.by_logits > 0u {
                gradient[p] = one.y;
                gradient[p + n] = one.z;
            }
        }
        if arg.by_logits > 0u { gradient[prior + k] = log_prob; }
        priors = with_term(priors, logits[prior + k]);
        posteriors = with_term(posteriors, log_prob);
    }
    let log_prior = log_of(priors);
    let log_posterior = log_of(posteriors);
    nats[at] = log_prior - log_posterior;
    if arg.by_logits == 0u { return; }
    for (var k = 0u; k < n; k++) {
        let posterior = exp(gradient[prior + k] - log_posterior);
        gradient[prior + k] = exp(logits[prior + k] - log_prior) - posterior;
        for (var i = rest + k; i < prior + width; i += n) { gradient[i] *= -posterior; }
    }
}
