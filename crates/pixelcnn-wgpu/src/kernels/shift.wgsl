// Moves every pixel down and right, zeros coming in.

fn run(at: u32) {
    let x = at / arg.channels % arg.w;
    let y = at / arg.channels / arg.w % arg.h;
    if y < arg.down || x < arg.right {
        to[at] = 0.0;
    } else {
        to[at] = given[at - (arg.down * arg.w + arg.right) * arg.channels];
    }
}
