//! What a GPU computes, beside the CPU, and how fast: `benches/gpu/run` calls it stage by stage.
//!
//!     gpu check            logits, nats, gradients and a step of many models, against the CPU's
//!     gpu layers           the gradient of every layer of the shipped model, against the CPU's
//!     gpu bits IMAGES      bits/dim of the shipped model on so many test images of CIFAR-10
//!     gpu sampling         images drawn on both, and how many a second
//!     gpu time             steps and evaluations of several sizes: images/s and memory
//!     gpu ranks            NCCL with one rank, and what shards of a batch cost

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::{Device, Precision, on_threads};
use pixelcnn::engine::{Engine, EngineError, State, Update};
use pixelcnn::kernels::adam::Adam;
use pixelcnn::kernels::muon::Muon;
use pixelcnn::kernels::pointwise::Dropout;
use pixelcnn::network::{Batch, Layout, draw_parameters};
use pixelcnn::ranks::{Alone, Sharing};
use pixelcnn::sample::{Drawn, Rows, Sampler, Sampling, sample};
use pixelcnn::{Model, ModelConfig, Nonlinearity};
use pixelcnn_cuda::Cuda;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let arguments: Vec<String> = arguments.collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let run = || match arguments[..] {
        ["check"] => check(),
        ["layers"] => layers(),
        ["bits", images] => bits(images.parse()?),
        ["sampling"] => sampling(),
        ["time"] => time(),
        ["ranks"] => ranks(),
        _ => Err("usage: gpu check | layers | bits IMAGES | sampling | time | ranks".into()),
    };
    let done = on_threads(0, || run().map_err(|error| error.to_string()));
    match done.map_err(|error| error.to_string()).flatten() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu: {error}");
            ExitCode::FAILURE
        }
    }
}

fn gpu(precision: Precision) -> Device {
    Device::Cuda {
        number: 0,
        precision,
    }
}

/// How far results in a precision may be off, as a share of their length: the logits, and the whole
/// gradient.
fn tolerance(precision: Precision) -> [f64; 2] {
    match precision {
        Precision::F32 => [1e-5, 1e-4],
        Precision::Tf32 => [2e-3, 5e-3],
        _ => [2e-2, 4e-2],
    }
}

/// Images that are no noise: slopes of all directions, with some noise.
fn images(config: &ModelConfig, count: usize) -> (Vec<u8>, Vec<u32>) {
    let mut random = 1u32;
    let mut draw = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        random >> 16
    };
    let mut images = Vec::new();
    for image in 0..count {
        for y in 0..config.height {
            for x in 0..config.width {
                for c in 0..config.channels {
                    let slope = (image + 1) * x + (c + 2) * y;
                    images.push((slope as u32 + draw() % 32) as u8);
                }
            }
        }
    }
    let classes = config.nr_classes.max(1) as u32;
    let labels = (0..count).map(|_| draw() % classes).collect();
    (images, labels)
}

fn state(parameters: &[Vec<f32>]) -> State {
    let zeros: Vec<Vec<f32>> = parameters.iter().map(|p| vec![0.0; p.len()]).collect();
    State {
        parameters: parameters.to_vec(),
        average: parameters.to_vec(),
        first: zeros.clone(),
        second: zeros,
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// The distance of two arrays, as a share of the second one's length.
fn off<'a>(got: impl Iterator<Item = &'a f32>, want: impl Iterator<Item = &'a f32> + Clone) -> f64 {
    let wide = |value: &f32| f64::from(*value);
    let length = norm(want.clone().map(wide));
    norm(got.zip(want).map(|(a, b)| wide(a) - wide(b))) / length
}

/// What an engine gives for a batch.
struct Outcome {
    logits: Vec<f32>,
    nats: Vec<f64>,
    gradients: Vec<Vec<f32>>,
}

fn outcome(
    engine: &mut dyn Engine,
    parameters: &[Vec<f32>],
    batch: Batch,
) -> std::result::Result<Outcome, EngineError> {
    engine.load_weights(parameters)?;
    let (logits, nats) = (engine.logits(batch)?, engine.nats_per_image(batch)?);
    engine.load(state(parameters))?;
    engine.backward(batch, Some(DROPOUT))?;
    Ok(Outcome {
        logits,
        nats,
        gradients: engine.gradients()?,
    })
}

const DROPOUT: Dropout = Dropout {
    rate: 0.5,
    seed: 9,
    first: 0,
};

/// Models of every kind, and the presets' shapes at a small number of images.
fn models() -> Vec<(&'static str, ModelConfig, usize)> {
    let small = ModelConfig {
        height: 8,
        width: 12,
        nr_resnet: 1,
        nr_filters: 8,
        nr_logistic_mix: 3,
        ..ModelConfig::default()
    };
    let sized = |nr_filters, nr_resnet, nr_logistic_mix| ModelConfig {
        nr_filters,
        nr_resnet,
        nr_logistic_mix,
        ..ModelConfig::default()
    };
    vec![
        ("small", small.clone(), 5),
        (
            "odd filters, classes",
            ModelConfig {
                nr_filters: 13,
                nr_classes: 3,
                ..small.clone()
            },
            3,
        ),
        (
            "grey, elu",
            ModelConfig {
                channels: 1,
                nonlinearity: Nonlinearity::Elu,
                ..small.clone()
            },
            4,
        ),
        (
            "relu",
            ModelConfig {
                nonlinearity: Nonlinearity::Relu,
                ..small
            },
            4,
        ),
        ("quick", sized(24, 1, 5), 4),
        ("48/2", sized(48, 2, 5), 4),
        ("64/2", sized(64, 2, 10), 4),
        ("160/5", sized(160, 5, 10), 2),
    ]
}

fn check() -> Result {
    // What is missing is said once.
    gpu(Precision::F32).engine(&models()[0].1)?;
    let mut failed = Vec::new();
    println!("| model | precision | logits off | bits/dim | CPU's | gradient off | same bits |");
    println!("|---|---|--:|--:|--:|--:|---|");
    for (name, config, count) in models() {
        let mut parameters = draw_parameters(&config, 3);
        let (images, labels) = images(&config, count);
        let batch = Batch {
            images: &images,
            labels: &labels,
            ..Batch::default()
        };
        let mut cpu = Device::CPU.engine(&config)?;
        cpu.initialise(&mut parameters, batch, None)?;
        let want = outcome(&mut *cpu, &parameters, batch)?;
        for precision in Precision::ALL {
            let got = gpu(precision).engine(&config).and_then(|mut gpu| {
                let got = outcome(&mut *gpu, &parameters, batch)?;
                let mut one = on_one_branch(precision, &config)?;
                Ok((got, steps(&mut *gpu, &mut one, &parameters, batch)?))
            });
            let (got, same) = match got {
                Ok(got) => got,
                Err(error) => {
                    println!("| {name} | {precision} | {error} |");
                    failed.push(format!("{name} in {precision}"));
                    continue;
                }
            };
            let logits = off(got.logits.iter(), want.logits.iter());
            let gradients = off(
                got.gradients.iter().flatten(),
                want.gradients.iter().flatten(),
            );
            let mean = |nats: &[f64]| config.bits_per_dim(nats.iter().sum::<f64>() / count as f64);
            println!(
                "| {name} | {precision} | {logits:.1e} | {:.5} | {:.5} | {gradients:.1e} | {} |",
                mean(&got.nats),
                mean(&want.nats),
                if same { "yes" } else { "NO" }
            );
            let [by_logits, by_gradients] = tolerance(precision);
            if !same || logits.is_nan() || logits > by_logits || gradients > by_gradients {
                failed.push(format!("{name} in {precision}"));
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(format!("beyond the tolerance: {}", failed.join(", ")).into()),
    }
}

/// The engine on one branch.
fn on_one_branch(
    precision: Precision,
    config: &ModelConfig,
) -> std::result::Result<Cuda, EngineError> {
    // Where the others keep what they compile.
    let cache = std::env::var_os("PIXELCNN_CACHE").map(|cache| Path::new(&cache).join("cuda"));
    Ok(Cuda::new(config, 0, precision, cache.as_deref())?.on_one_branch())
}

/// Whether steps are the same bits, as graphs, operation by operation, a second time, and on one
/// branch.
fn steps(
    engine: &mut dyn Engine,
    one: &mut dyn Engine,
    parameters: &[Vec<f32>],
    batch: Batch,
) -> std::result::Result<bool, EngineError> {
    let run = |engine: &mut dyn Engine, whole: bool| {
        engine.load(state(parameters))?;
        for step in 1..5 {
            let dropout = Some(Dropout {
                seed: step,
                ..DROPOUT
            });
            let update = Update::from(Adam {
                step,
                ..Adam::default()
            });
            match whole {
                true => engine.step(batch, dropout, &update).map(drop)?,
                false => {
                    engine.backward(batch, dropout)?;
                    engine.update(&update)?;
                }
            }
        }
        engine.unload()
    };
    let first = run(engine, true)?;
    Ok(first == run(engine, false)? && first == run(engine, true)? && first == run(one, true)?)
}

fn layers() -> Result {
    let model = Model::pretrained()?;
    let (images, labels) = images(&model.config, 8);
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    let want = outcome(
        &mut *Device::CPU.engine(&model.config)?,
        &model.weights,
        batch,
    )?;
    let parameters = Layout::new(&model.config).parameters;
    for precision in Precision::ALL {
        let mut engine = gpu(precision).engine(&model.config)?;
        let got = outcome(&mut *engine, &model.weights, batch)?;
        let pairs = got.gradients.iter().zip(&want.gradients);
        let mut worst: Vec<(f64, &str)> = parameters
            .iter()
            .zip(pairs)
            .map(|(parameter, (got, want))| (off(got.iter(), want.iter()), &parameter.name[..]))
            .collect();
        worst.sort_by(|a, b| b.0.total_cmp(&a.0));
        println!("{precision}: {} gradients; the worst:", worst.len());
        for (off, name) in &worst[..5] {
            println!("  {off:.1e}  {name}");
        }
    }
    Ok(())
}

fn bits(count: usize) -> Result {
    let model = Model::pretrained()?;
    let data = Dataset::open(&DataConfig::default(), Split::Test)?;
    let indices: Vec<usize> = (0..count.min(data.len())).collect();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    data.read(&indices, &mut images, &mut labels)?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    let devices = [Device::CPU].into_iter().chain(Precision::ALL.map(gpu));
    for device in devices {
        let network = model.network(&device)?;
        network.nats_per_image(Batch {
            images: &images[..model.config.dims()],
            labels: &labels[..1],
            ..Batch::default()
        })?;
        let start = Instant::now();
        let nats = network.nats_per_image(batch)?;
        let seconds = start.elapsed().as_secs_f64();
        let mean = nats.iter().sum::<f64>() / nats.len() as f64;
        println!(
            "{device:?}: {:.5} bits/dim of {} images, {:.0} images/s",
            model.config.bits_per_dim(mean),
            nats.len(),
            nats.len() as f64 / seconds
        );
    }
    Ok(())
}

fn sampling() -> Result {
    let model = Model::pretrained()?;
    let device = gpu(Precision::F32);
    let go_on = &mut |_: Drawn| ControlFlow::Continue(());
    let images = |device: &Device, count: usize| {
        let sampling = Sampling::of(count, 1);
        let sampler = model.sampler(device)?;
        sample(&sampler, &sampling, 0..count, &mut |drawn| go_on(drawn))
    };
    let (on_gpu, on_cpu) = (images(&device, 16)?, images(&Device::CPU, 16)?);
    let dims = model.config.dims();
    let pairs = on_gpu.chunks_exact(dims).zip(on_cpu.chunks_exact(dims));
    let same = pairs.filter(|(a, b)| a == b).count();
    let mean = |images: &[u8]| -> Result<f64> {
        let bits = model.bits_per_dim(images, &[])?;
        Ok(bits.iter().sum::<f64>() / bits.len() as f64)
    };
    println!(
        "{same} of 16 images are the CPU's to the last bit (a value between two levels may be rounded \
         either way, and what follows hangs on it); {:.3} bits/dim, the CPU's {:.3}",
        mean(&on_gpu)?,
        mean(&on_cpu)?
    );

    println!("| size | images at a time | images/s |");
    println!("|---|--:|--:|");
    for ([nr_filters, nr_resnet, nr_logistic_mix], _) in SIZES {
        let config = ModelConfig {
            nr_filters,
            nr_resnet,
            nr_logistic_mix,
            ..ModelConfig::default()
        };
        let sampler = Sampler::new(&config, &draw_parameters(&config, 3), &device)?;
        for count in [64, 1024] {
            let sampling = Sampling::of(count, 1);
            let images = (0..count).map(|i| sampling.image(&config, i));
            let mut rows = Rows::new(&sampler, images)?;
            // Kinds of pixels that are new are recorded in the first four rows.
            rows.by_ref().take(4).try_for_each(|row| row.map(drop))?;
            let start = Instant::now();
            rows.by_ref().take(4).try_for_each(|row| row.map(drop))?;
            let seconds = start.elapsed().as_secs_f64() * config.height as f64 / 4.0;
            let speed = count as f64 / seconds;
            println!("| {nr_filters}/{nr_resnet} | {count} | {speed:.0} |");
        }
    }
    Ok(())
}

/// Filters, blocks, mixture components, and the batches to time.
const SIZES: [([usize; 3], &[usize]); 3] = [
    ([160, 5, 10], &[16, 64, 256]),
    ([64, 2, 10], &[64, 256]),
    ([48, 2, 5], &[64, 256]),
];

fn time() -> Result {
    gpu(Precision::F32).engine(&models()[0].1)?;
    println!(
        "| size | batch | precision | step | on one branch | by Muon | images/s | evaluation, images/s \
         | memory |"
    );
    println!("|---|--:|---|--:|--:|--:|--:|--:|--:|");
    for ([nr_filters, nr_resnet, nr_logistic_mix], batches) in SIZES {
        let config = ModelConfig {
            nr_filters,
            nr_resnet,
            nr_logistic_mix,
            ..ModelConfig::default()
        };
        let parameters = draw_parameters(&config, 3);
        for precision in Precision::ALL.into_iter().rev() {
            for &count in batches {
                let size = format!("{nr_filters}/{nr_resnet} | {count} | {precision}");
                match time_one(&config, &parameters, precision, count) {
                    Ok(figures) => println!("| {size} | {figures} |"),
                    Err(error) => println!("| {size} | {error} |"),
                }
            }
        }
    }
    Ok(())
}

fn time_one(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    precision: Precision,
    count: usize,
) -> Result<String> {
    let (images, labels) = images(config, count);
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    let mut one: Box<dyn Engine> = Box::new(on_one_branch(precision, config)?);
    let one_branch = step_of(&mut *one, parameters, batch, None)?;
    drop(one);
    let mut engine = gpu(precision).engine(config)?;
    let muon = Muon {
        learning_rate: 1e-9,
    };
    let by_muon = step_of(&mut *engine, parameters, batch, Some(muon))?;
    let step = step_of(&mut *engine, parameters, batch, None)?;
    let memory = used().map_or("unknown".into(), |mib| format!("{mib} MiB"));
    engine.load_weights(parameters)?;
    let mut evaluate = || engine.nats_per_image(batch).map(drop);
    let evaluation = median(2, &mut evaluate)?;
    Ok(format!(
        "{:.2} ms | {:.2} ms | {:.2} ms | {:.0} | {:.0} | {memory}",
        1e3 * step,
        1e3 * one_branch,
        1e3 * by_muon,
        count as f64 / step,
        count as f64 / evaluation
    ))
}

/// What NCCL does with one rank, and how long steps take whose batch is cut into shards.
fn ranks() -> Result {
    let config = &ModelConfig {
        nr_filters: 160,
        nr_resnet: 5,
        ..ModelConfig::default()
    };
    let (parameters, count) = (draw_parameters(config, 3), 64);
    let (images, labels) = images(config, count);
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    println!("| shards of {count} images, 160/5, bf16 | ms a step |");
    println!("|--:|--:|");
    for shards in [1, 2, 4, 8] {
        let mut engine = gpu(Precision::Bf16).engine(config)?;
        engine.share(Some(Sharing::new(Arc::new(Alone), count, shards)?))?;
        let step = step_of(&mut *engine, &parameters, batch, None)?;
        println!("| {shards} | {:.2} |", 1e3 * step);
    }
    let speed = pixelcnn_cuda::exchange_with_itself(0, None)?;
    println!(
        "NCCL, a GPU to itself: {:.1} GB/s, eagerly and in a graph the same bytes",
        speed / 1e9
    );
    Ok(())
}

/// Seconds of a step.
fn step_of(
    engine: &mut dyn Engine,
    parameters: &[Vec<f32>],
    batch: Batch,
    muon: Option<Muon>,
) -> Result<f64> {
    engine.load(state(parameters))?;
    // So small that the loss stays a number, whatever the parameters are.
    let adam = Adam {
        learning_rate: 1e-9,
        ..Adam::default()
    };
    let update = Update { adam, muon };
    let mut step = || engine.step(batch, Some(DROPOUT), &update).map(drop);
    // Everything is chosen in the first, and recorded in the second.
    median(3, &mut step)
}

/// Median seconds of runs after some that don't count, for a second or ten of them.
fn median(
    first: usize,
    run: &mut dyn FnMut() -> std::result::Result<(), EngineError>,
) -> Result<f64> {
    (0..first).try_for_each(|_| run())?;
    let (begin, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < 3 || (seconds.len() < 10 && begin.elapsed().as_secs() < 1) {
        let start = Instant::now();
        run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Megabytes in use on the GPU.
fn used() -> Option<String> {
    let program = Path::new("nvidia-smi");
    let query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"];
    let output = Command::new(program).args(query).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.lines().next()?.trim().to_owned())
}
