// What all kernels begin with.

const NONE = 0xffffffffu;

// Elementary functions that keep their digits where WGSL's own may not: around 0, and far from it.

fn tanh_of(x: f32) -> f32 {
    let e = exp(-2.0 * abs(x));
    let far = (1.0 - e) / (1.0 + e);
    let square = x * x;
    // The series, where the difference above would cancel.
    let near = abs(x) * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))));
    return sign(x) * select(far, near, abs(x) < 0.15);
}

// e^x - 1 for x that are not above 0.
fn expm1_of(x: f32) -> f32 {
    let series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x / 720.0)))));
    return select(exp(x) - 1.0, series, x > -0.25);
}

fn sinh_of(x: f32) -> f32 {
    let square = x * x;
    let series = x * (1.0 + square * (1.0 / 6.0 + square * (1.0 / 120.0 + square / 5040.0)));
    return select(0.5 * (exp(x) - exp(-x)), series, abs(x) < 0.5);
}

fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x > 0.0) / (1.0 + e);
}

// Whether a value is neither infinite nor no number; a compiler may take for granted that all are.
fn is_number(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// What dropout makes of the value at a place of a map: a function of the place alone, as on the CPU.
// `drop` is two keys, a threshold and a scale.
fn kept_by(drop: vec4u, at: u32) -> f32 {
    var h = at + drop.x;
    h = (h ^ (h >> 16u)) * 0x7feb352du;
    h = h ^ (h >> 15u) ^ drop.y;
    h = h * 0x846ca68bu;
    h = (h ^ (h >> 16u)) >> 8u;
    return select(bitcast<f32>(drop.w), 0.0, h < drop.z);
}

// The logarithm of a sum of exponentials, a term at a time: its largest term, and the sum without it.
fn with_term(total: vec2f, term: f32) -> vec2f {
    if term > total.x {
        return vec2f(term, total.y * exp(total.x - term) + 1.0);
    }
    return vec2f(total.x, total.y + exp(term - total.x));
}
const NOTHING = vec2f(-3.0e38, 0.0);

fn log_of(total: vec2f) -> f32 {
    return total.x + log(total.y);
}
