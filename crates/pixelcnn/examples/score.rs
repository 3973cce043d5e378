//! How likely the shipped model, or one of your own, finds each of some images:
//! `cargo run --release --example score -- IMAGES [MODEL]`, where IMAGES is a folder of pictures or a
//! `.npy` or `.npz` file.

use std::error::Error;

use pixelcnn::Model;
use pixelcnn::data::{DataConfig, Dataset, Split};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let data = arguments.next().ok_or("usage: score IMAGES [MODEL]")?;
    let model = match arguments.next() {
        Some(path) => Model::open(path.as_ref())?,
        None => Model::pretrained()?,
    };
    let data = DataConfig {
        data,
        ..DataConfig::default()
    };
    let images = Dataset::open(&data, Split::Test)?;
    let indices: Vec<usize> = (0..images.len()).collect();
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    images.read(&indices, &mut pixels, &mut labels)?;
    for (image, bits) in model.bits_per_dim(&pixels, &labels)?.iter().enumerate() {
        println!("{image} {bits:.3} bits/dim");
    }
    Ok(())
}
