const CONCAT_ELU = 0u;
const RELU = 2u;

// What dropout makes of the value at a place of the map that is bent.
fn kept(at: u32) -> f32 {
    if arg.dropping == 0u {
        return 1.0;
    }
    let place = 4u * arg.block;
    return kept_by(vec4u(drops[place], drops[place + 1u], drops[place + 2u], drops[place + 3u]), at);
}

