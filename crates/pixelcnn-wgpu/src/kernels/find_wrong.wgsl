// Raises the flag where a value is not a number or infinite.

fn run(at: u32) {
    if !is_number(values_of[at]) { wrong[0] = 1u; }
}
