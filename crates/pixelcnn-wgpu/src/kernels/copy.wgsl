fn run(at: u32) {
    to[at] = given[at];
}
