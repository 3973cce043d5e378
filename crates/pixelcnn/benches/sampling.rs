//! How fast images are drawn on this machine's CPU, on as many threads as `RAYON_NUM_THREADS` says
//! (2 for the README's figures): one pass for every pixel, the incremental evaluator, and one
//! parallel forward pass over the same images.
//!
//! `cargo bench -p pixelcnn --bench sampling [-- --size FILTERS/RESNET] [--batches 1,16] [--short]`
//!
//! What takes long is timed in part, and the table says so: a few of the naive way's 1,024 passes,
//! over whole images as the original's and over the rows so far; and with `--short` or large models
//! some rows of the images, a multiple of the four in which all resolutions have their turns.

use std::error::Error;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use pixelcnn::ModelConfig;
use pixelcnn::device::{Device, on_threads};
use pixelcnn::incremental::Evaluator;
use pixelcnn::network::{Batch, Network, draw_parameters, initialise};
use pixelcnn::sample::{Rows, Sampling};

const USAGE: &str = "usage: sampling [--size FILTERS/RESNET] [--batches N,...] [--short]";

fn main() -> ExitCode {
    // As the program runs.
    let done = on_threads(0, || {
        let done = run();
        done.inspect_err(|error| eprintln!("sampling: {error}"))
            .is_ok()
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut sizes = vec![[32, 2], [160, 5]];
    let mut batches = vec![1, 16, 64, 256];
    let mut short = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(USAGE);
        match argument.as_str() {
            // Cargo adds it.
            "--bench" => {}
            "--short" => short = true,
            "--size" => {
                let size = value()?;
                let (filters, resnet) = size.split_once('/').ok_or(USAGE)?;
                sizes = vec![[filters.parse()?, resnet.parse()?]];
            }
            "--batches" => {
                let list = value()?;
                let list = list.split(',').map(str::parse);
                batches = list.collect::<Result<_, _>>()?;
            }
            _ => return Err(USAGE.into()),
        }
    }
    println!("{} threads\n", rayon::current_num_threads());
    for size in sizes {
        table(size, &batches, short);
    }
    Ok(())
}

/// Coloured waves: neighbours alike as in pictures, and every level occurs.
fn waves(config: &ModelConfig, n: usize) -> Vec<u8> {
    let image = |i: usize| {
        let (channel, x, y, n) = (i % 3, i / 3 % 32, i / 96 % 32, i / 3072);
        let wave = (x * (1 + channel + n % 5) + 2 * y * (n % 3) + n) as f32 / 9.0;
        (127.5 + 140.0 * (wave + channel as f32).sin()).clamp(0.0, 255.0) as u8
    };
    (0..n * config.dims()).map(image).collect()
}

fn table([nr_filters, nr_resnet]: [usize; 2], batches: &[usize], short: bool) {
    let config = ModelConfig {
        nr_filters,
        nr_resnet,
        ..ModelConfig::default()
    };
    let large = nr_filters * nr_filters * nr_resnet > 1 << 14;
    let mut parameters = draw_parameters(&config, 1);
    let images = waves(&config, 8);
    let batch = Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    };
    initialise(&config, &mut parameters, batch, None, &Device::CPU).unwrap();
    let network = Network::new(&config, &parameters, &Device::CPU).unwrap();
    let start = Instant::now();
    let evaluator = match Evaluator::new(&config, &parameters) {
        Ok(evaluator) => evaluator,
        Err(error) => return eprintln!("{error}"),
    };
    let packed = start.elapsed();

    println!("## {nr_filters} filters, {nr_resnet} blocks, 32x32x3\n");
    println!("| what | batch | s/image | times one parallel pass | times faster than naive |");
    println!("|---|--:|--:|--:|--:|");
    let passes = if large { 1 } else { 8 };
    let pixels = (config.height * config.width) as f64;
    let naive = pixels * pass(&network, 16, passes);
    println!("| one pass per pixel ({passes} of {pixels} passes timed) | 16 | {naive:.3} | | 1 |");
    // On average over the image, a pass over the rows so far, in fours, has 18 of 32 rows.
    let so_far = [16, 20].map(|height| {
        let config = ModelConfig {
            height,
            ..config.clone()
        };
        let top = Network::new(&config, &parameters, &Device::CPU).unwrap();
        pixels * pass(&top, 16, passes) / 2.0
    });
    let so_far = so_far[0] + so_far[1];
    println!(
        "| the same, over the rows so far ({} passes timed) | 16 | {so_far:.3} | | {:.1} |",
        2 * passes,
        naive / so_far
    );
    for &n in batches {
        let pass_batch = n.min(if large { 16 } else { 64 });
        let pass = pass(&network, pass_batch, if large { 1 } else { 3 });
        let rows = match (short, large, n) {
            (true, true, 64..) | (false, true, 256..) => 4,
            (true, true, _) | (true, _, 64..) | (false, true, 64..) => 8,
            _ => config.height,
        };
        let drawn = incremental(&evaluator, n, rows);
        let timed = match rows == config.height {
            true => String::new(),
            false => format!(" ({rows} of {} rows timed)", config.height),
        };
        println!("| one parallel pass | {pass_batch} | {pass:.4} | 1 | |");
        println!(
            "| incremental{timed} | {n} | {drawn:.4} | {:.2} | {:.0} |",
            drawn / pass,
            naive / drawn
        );
        if n == 1 {
            let floor = floor(&evaluator);
            println!(
                "| only reading the weights | 1 | {floor:.4} | | |\n\
                 | incremental by that | 1 | {:.2} times | | |",
                drawn / floor
            );
        }
    }
    println!(
        "\nPacking took {:.2} s, {} MB; an image takes {:.1} MB.\n",
        packed.as_secs_f64(),
        evaluator.weight_bytes() >> 20,
        evaluator.bytes_per_image() as f64 / f64::from(1 << 20)
    );
}

/// Seconds for an image of one parallel pass with its likelihood.
fn pass(network: &Network, n: usize, runs: usize) -> f64 {
    let images = waves(network.config(), n);
    let batch = Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    };
    let seconds = (0..=runs).map(|_| {
        let start = Instant::now();
        black_box(network.nats_per_image(batch).is_ok());
        start.elapsed().as_secs_f64()
    });
    // The first one warms up.
    seconds.skip(1).fold(f64::INFINITY, f64::min) / n as f64
}

/// Seconds to draw an image, `n` side by side, from so many rows.
fn incremental(evaluator: &Evaluator, n: usize, rows: usize) -> f64 {
    let sampling = Sampling {
        labels: vec![0; n],
        temperature: 1.0,
        seed: 1,
        coarse: Vec::new(),
    };
    let images = (0..n).map(|i| sampling.image(evaluator.config(), i));
    let Ok(mut drawing) = Rows::new(&evaluator.clone().into(), images) else {
        return f64::NAN;
    };
    let height = evaluator.config().height;
    if rows < height {
        // The first touch of the memory is no part of a row.
        drawing.by_ref().take(4).for_each(drop);
    }
    let start = Instant::now();
    drawing.by_ref().take(rows).for_each(drop);
    start.elapsed().as_secs_f64() * height as f64 / rows as f64 / n as f64
}

/// Seconds to read what the pixels of one image need of the weights, shared among the threads.
fn floor(evaluator: &Evaluator) -> f64 {
    let config = evaluator.config();
    let threads = rayon::current_num_threads();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for pixel in 0..config.height * config.width {
                    let pixel = [pixel / config.width, pixel % config.width];
                    for weights in evaluator.weights_of(pixel) {
                        let part = weights.len() / threads;
                        black_box(sum(&weights[thread * part..][..part]));
                    }
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

/// In many sums at a time, so that reading is all that takes time.
fn sum(values: &[f32]) -> f32 {
    let mut sums = [0.0; 64];
    for values in values.as_chunks::<64>().0 {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
    sums.iter().sum()
}
