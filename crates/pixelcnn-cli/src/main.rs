//! The program `pixelcnn`.
fn main() {}
