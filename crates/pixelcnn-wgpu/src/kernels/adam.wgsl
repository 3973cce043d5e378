// Adam's step and the Polyak average, unless the flag is up: pixelcnn-core's kernels/adam.rs. `rates` are take_1,
// take_2, rate, correction_2, epsilon, take_average.

fn run(at: u32) {
    if wrong[0] > 0u { return; }
    let own = gradient[at];
    let mean = first[at] + rates[0] * (own - first[at]);
    let square = second[at] + rates[1] * (own * own - second[at]);
    let moved = parameter[at] - rates[2] * mean / sqrt(square * rates[3] + rates[4]);
    first[at] = mean;
    second[at] = square;
    parameter[at] = moved;
    average[at] += rates[5] * (moved - average[at]);
}
