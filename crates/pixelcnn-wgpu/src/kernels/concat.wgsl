// Copies a map into a concatenation of which it is a part.

fn run(at: u32) {
    to[at / arg.count * arg.whole + arg.first + at % arg.count] = given[at];
}
