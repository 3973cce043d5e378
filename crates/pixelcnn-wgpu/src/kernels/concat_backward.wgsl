fn run(at: u32) {
    let through = dy[at / arg.count * arg.whole + arg.first + at % arg.count];
    dx[at] = select(0.0, dx[at], arg.accumulate > 0u) + through;
}
