//! All devices of this machine that the build knows, side by side: how far each one's results are from the CPU's, and
//! how fast it is.
//!
//!     cargo bench -p pixelcnn --features wgpu --bench devices -- [FILTERS/RESNET/IMAGES]...

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use pixelcnn::ModelConfig;
#[cfg(feature = "wgpu")]
use pixelcnn::device::DeviceError;
use pixelcnn::device::{self, Device, on_threads};
use pixelcnn::engine::{EngineError, State, Update};
use pixelcnn::kernels::adam::Adam;
use pixelcnn::kernels::pointwise::Dropout;
use pixelcnn::network::{Batch, draw_parameters};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const SIZES: [&str; 2] = ["32/2/16", "160/5/16"];
/// Of which the median is taken.
const TURNS: usize = 5;
/// Of a GPU's logits, from the CPU's.
const TOLERANCE: f64 = 1e-5;

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let sizes: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let run = || match &sizes[..] {
        [] => SIZES.iter().try_for_each(|size| compare(size, true)),
        sizes => sizes.iter().try_for_each(|size| compare(size, false)),
    };
    let done = on_threads(0, || run().map_err(|error| error.to_string()));
    match done.map_err(|error| error.to_string()).flatten() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("devices: {error}");
            ExitCode::FAILURE
        }
    }
}

/// All devices; but for one that only stands in for a GPU, unless sizes are asked for.
#[cfg_attr(not(feature = "wgpu"), expect(unused_variables))]
fn compare(size: &str, usual: bool) -> Result {
    let numbers: std::result::Result<Vec<usize>, _> = size.split('/').map(str::parse).collect();
    let [nr_filters, nr_resnet, count] = numbers?[..] else {
        return Err(format!("{size}: give filters/resnets/images").into());
    };
    let config = ModelConfig {
        nr_filters,
        nr_resnet,
        ..ModelConfig::default()
    };
    let mut random = 1u32;
    let images: Vec<u8> = (0..count * config.dims())
        .map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 24) as u8
        })
        .collect();
    let batch = Batch {
        images: &images,
        ..Batch::default()
    };
    let mut parameters = draw_parameters(&config, 3);
    let cpu = Device::CPU.engine(&config)?;
    let want = cpu.initialise(&mut parameters, batch, None)?;
    println!("\n{nr_filters}/{nr_resnet}, {count} images at a time");
    println!("| device | | logits off | step, images/s | evaluation, images/s |");
    println!("|---|---|--:|--:|--:|");
    let mut failed = Vec::new();
    for found in device::devices()? {
        let (device, name) = (found.device, found.name);
        #[cfg(feature = "wgpu")]
        if let (true, Some(lack @ DeviceError::Wgpu(_))) = (usual, device.lacks()) {
            println!("| {device} | {name} | left out: {lack} |");
            continue;
        }
        match figures(device, &config, &parameters, batch, &want) {
            Ok((off, figures)) => {
                println!("| {device} | {name} | {off:.1e} | {figures} |");
                if off.is_nan() || off > TOLERANCE {
                    failed.push(device.to_string());
                }
            }
            Err(error) => {
                println!("| {device} | {name} | {error} |");
                failed.push(device.to_string());
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(format!("failed, or beyond the tolerance: {}", failed.join(", ")).into()),
    }
}

fn figures(
    device: Device,
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    batch: Batch,
    want: &[f32],
) -> std::result::Result<(f64, String), EngineError> {
    let mut engine = device.engine(config)?;
    engine.load_weights(parameters)?;
    let logits = engine.logits(batch)?;
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = logits.iter().zip(want).map(|(a, b)| f64::from(a - b));
    let off = length(&mut { difference }) / length(&mut want.iter().copied().map(f64::from));
    let count = batch.images.len() / config.dims();
    let evaluation = median(|| engine.nats_per_image(batch).map(drop))?;
    let zeros: Vec<Vec<f32>> = parameters.iter().map(|p| vec![0.0; p.len()]).collect();
    engine.load(State {
        parameters: parameters.to_vec(),
        average: parameters.to_vec(),
        first: zeros.clone(),
        second: zeros,
    })?;
    let update = Update::from(Adam {
        learning_rate: 1e-9,
        ..Adam::default()
    });
    let dropout = Dropout {
        rate: 0.5,
        seed: 9,
        first: 0,
    };
    let step = median(|| engine.step(batch, Some(dropout), &update).map(drop))?;
    let rate = |seconds: f64| count as f64 / seconds;
    Ok((off, format!("{:.1} | {:.1}", rate(step), rate(evaluation))))
}

/// Seconds that something takes, once it was done for the first time.
fn median(
    mut what: impl FnMut() -> std::result::Result<(), EngineError>,
) -> std::result::Result<f64, EngineError> {
    what()?;
    let mut seconds = Vec::new();
    for _ in 0..TURNS {
        let start = Instant::now();
        what()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[TURNS / 2])
}
