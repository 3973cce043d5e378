//! Trains a small model on images of your own, then draws from it:
//! `cargo run --release --example train -- IMAGES RUN`, where IMAGES is a folder of pictures or a
//! `.npy` or `.npz` file and RUN a new folder for the results.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;

use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::{Event, train};
use pixelcnn::{ModelConfig, device};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(data), Some(run)) = (arguments.next(), arguments.next()) else {
        return Err("usage: train IMAGES RUN".into());
    };
    let data = DataConfig {
        data,
        ..DataConfig::default()
    };
    let images = Dataset::open(&data, Split::Train)?;
    let test = Dataset::open(&data, Split::Test)?;
    println!("{}", images.describe());

    let config = RunConfig {
        model: ModelConfig {
            height: images.height(),
            width: images.width(),
            channels: images.channels(),
            nr_resnet: 1,
            nr_filters: 8,
            nr_logistic_mix: 3,
            ..ModelConfig::default()
        },
        train: TrainConfig {
            batch_size: 8,
            learning_rate: 3e-3,
            epochs: 1,
            polyak_decay: 0.9,
            samples: 4,
            ..TrainConfig::default()
        },
        data,
    };
    let mut observer = |event: Event| {
        match event {
            Event::Step {
                step, bits_per_dim, ..
            } => println!("step {step}: {bits_per_dim:.3} bits/dim"),
            Event::Evaluated {
                bits_per_dim,
                standard_error,
                ..
            } => println!("test: {bits_per_dim:.3} ± {standard_error:.3} bits/dim"),
            Event::Sampled { path } => println!("samples: {}", path.display()),
            _ => {}
        }
        ControlFlow::Continue(())
    };
    let device = device::parse("auto")?;
    let run = PathBuf::from(run);
    train(&run, &config, None, &images, &test, &device, &mut observer)?;
    Ok(())
}
