fn run(at: u32) {
    let x = at / arg.channels % arg.w;
    let y = at / arg.channels / arg.w % arg.h;
    var moved = 0.0;
    if y + arg.down < arg.h && x + arg.right < arg.w {
        moved = dy[at + (arg.down * arg.w + arg.right) * arg.channels];
    }
    dx[at] = select(0.0, dx[at], arg.accumulate > 0u) + moved;
}
