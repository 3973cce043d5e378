//! Trains a small model on images of your own, then draws from it:
//! `cargo run --release --example train -- IMAGES RUN`, where IMAGES is a folder of pictures or a
//! `.npy` or `.npz` file and RUN a new folder for the results.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use pixelcnn::data::{DataConfig, Dataset};
use pixelcnn::device::Device;
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::{Event, Training};
use pixelcnn::{Model, ModelConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(data), Some(run)) = (arguments.next(), arguments.next()) else {
        return Err("usage: train IMAGES RUN".into());
    };
    let data = DataConfig {
        data,
        ..DataConfig::default()
    };
    let (images, test) = Dataset::open_splits(&data)?;
    println!("{}", images.describe());

    let config = RunConfig {
        model: ModelConfig {
            nr_resnet: 1,
            nr_filters: 8,
            nr_logistic_mix: 3,
            ..images.model_config()
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
    let training = Training {
        folder: Path::new(&run),
        config: &config,
        images: &images,
        test: &test,
        device: Device::CPU,
        ranks: None,
    };
    // Every event may end in ControlFlow::Break(()): then the state is saved, for `resume`.
    training.begin(&mut |event| {
        match event {
            Event::Step {
                step, bits_per_dim, ..
            } => println!("step {step}: {bits_per_dim:.3} bits/dim"),
            Event::Sampled { path } => println!("samples: {}", path.display()),
            _ => {}
        }
        ControlFlow::Continue(())
    })?;

    let model = Model::open(Path::new(&run))?;
    if let Some(measured) = &model.card.measured {
        println!("test: {measured}");
    }
    Ok(())
}
