//! Draws 16 images from the shipped model, or from one of your own:
//! `cargo run --release --example sample -- samples.png [MODEL]`.

use std::error::Error;

use pixelcnn::picture::{grid, write_png};
use pixelcnn::sample::Sampling;
use pixelcnn::{Model, ModelConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let output = arguments.next().ok_or("usage: sample OUTPUT [MODEL]")?;
    let model = match arguments.next() {
        Some(path) => Model::open(path.as_ref())?,
        None => Model::pretrained()?,
    };
    let images = model.sample(&Sampling::of(16, 1))?;
    let ModelConfig {
        height,
        width,
        channels,
        ..
    } = model.config;
    let picture = grid(&images, [16, height, width, channels], 4, 1, 1)?;
    Ok(write_png(output.as_ref(), &picture)?)
}
