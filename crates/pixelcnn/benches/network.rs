//! How fast the whole network trains and evaluates on this machine's CPU, on as many threads as
//! `RAYON_NUM_THREADS` says:
//!
//! - `cargo bench -p pixelcnn --bench network [-- FILTERS RESNET MIXTURES BATCH]` prints a table;
//! - `… -- --sizes FILTERS RESNET MIXTURES` evaluates one picture, of more and more pixels;
//! - `… -- --exchange FILE FILTERS RESNET MIXTURES BATCH` writes a model, a batch and what comes
//!   out of them for another implementation to be checked against;
//! - `… -- --order FILE SEED EPOCHS` writes the training images of CIFAR-10, and the order in which a
//!   run of that seed uses them;
//! - `… -- --time training|evaluation FILE RUNS` times the model of such a file and prints one line
//!   of JSON: the seconds of every run, and the peak memory in bytes (on Linux).
//!
//! What is timed runs in bf16 with `--precision bf16` before all that, where the CPU has its instructions.
//!
//! `benches/peers` compares with PyTorch through the last three.

use std::collections::HashMap;
use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use pixelcnn::ModelConfig;
use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::{Device, Precision, has_bf16, on_threads};
use pixelcnn::engine::Engine;
use pixelcnn::kernels::pointwise::Dropout;
use pixelcnn::network::Layout;
use pixelcnn::network::{Batch, Network, draw_parameters, initialise};
use pixelcnn::train::config::TrainConfig;
use pixelcnn::train::next_step;
use pixelcnn::train::state::TrainState;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

const USAGE: &str = "usage: network [--precision bf16] [FILTERS RESNET MIXTURES BATCH] | --sizes FILTERS RESNET MIXTURES | \
    --exchange FILE FILTERS RESNET MIXTURES BATCH | --order FILE SEED EPOCHS | \
    --time training|evaluation FILE RUNS";

fn main() -> ExitCode {
    // As the program runs.
    let done = on_threads(0, || {
        let done = run();
        done.inspect_err(|error| eprintln!("network: {error}"))
            .is_ok()
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    // Cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (device, arguments) = match arguments[..] {
        ["--precision", "bf16", ref arguments @ ..] if has_bf16() => {
            let precision = Precision::Bf16;
            (Device::Cpu { precision }, arguments)
        }
        ["--precision", ..] => return Err("--precision: bf16, on a CPU with AVX-512 BF16".into()),
        ref arguments => (Device::CPU, arguments),
    };
    match arguments[..] {
        [] => table(device, &[[24, 1, 5, 16], [32, 2, 10, 16], [160, 5, 10, 8]]),
        ["--sizes", ref size @ ..] => sizes(device, numbers(size)?)?,
        ["--exchange", file, ref size @ ..] => exchange(Path::new(file), numbers(size)?)?,
        ["--order", file, seed, epochs] => order(Path::new(file), seed.parse()?, epochs.parse()?)?,
        ["--time", what, file, runs] => time(device, what, Path::new(file), runs.parse()?)?,
        ref size => table(device, &[numbers(size)?]),
    }
    Ok(())
}

/// \[filters, resnet, mixtures, batch\].
type Size = [usize; 4];

fn numbers<const N: usize>(size: &[&str]) -> Result<[usize; N], Box<dyn Error>> {
    let numbers: Result<Vec<usize>, _> = size.iter().map(|number| number.parse()).collect();
    let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
    numbers.ok_or_else(|| USAGE.into())
}

/// What one picture takes.
fn sizes(
    device: Device,
    [nr_filters, nr_resnet, nr_logistic_mix]: [usize; 3],
) -> Result<(), Box<dyn Error>> {
    println!("{:>10}{:>10}{:>8}", "picture", "pixels/s", "MB");
    for edge in [32, 64, 128, 256, 512, 1024] {
        let config = ModelConfig {
            height: edge,
            width: edge,
            nr_filters,
            nr_resnet,
            nr_logistic_mix,
            ..ModelConfig::default()
        };
        let images = vec![100; config.dims()];
        let network = Network::new(&config, &draw_parameters(&config, 1), &device)?;
        let timing = timing(3, |_| {
            black_box(network.nats_per_image(of_images(&images)).is_ok());
        });
        println!(
            "{:>10}{:>10.0}{:>8}",
            format!("{edge}x{edge}"),
            (edge * edge) as f64 / timing.median(),
            timing.megabytes().round(),
        );
    }
    Ok(())
}

/// A model of some size, the images of a batch, and parameters initialised by it.
fn start([nr_filters, nr_resnet, nr_logistic_mix, batch]: Size) -> State {
    let config = ModelConfig {
        nr_filters,
        nr_resnet,
        nr_logistic_mix,
        ..ModelConfig::default()
    };
    // Coloured waves: neighbours alike as in pictures, and every level occurs.
    let image = |i: usize| {
        let (channel, x, y, n) = (i % 3, i / 3 % 32, i / 96 % 32, i / 3072);
        let wave = (x * (1 + channel + n) + 2 * y * (n % 3)) as f32 / 9.0;
        (127.5 + 140.0 * (wave + channel as f32).sin()).clamp(0.0, 255.0) as u8
    };
    let images: Vec<u8> = (0..batch * config.dims()).map(image).collect();
    let mut parameters = draw_parameters(&config, 1);
    initialise(
        &config,
        &mut parameters,
        of_images(&images),
        None,
        &Device::CPU,
    )
    .unwrap();
    State {
        config,
        images,
        parameters,
    }
}

/// What is timed.
struct State {
    config: ModelConfig,
    images: Vec<u8>,
    parameters: Vec<Vec<f32>>,
}

fn of_images(images: &[u8]) -> Batch<'_> {
    Batch {
        images,
        labels: &[],
        ..Batch::default()
    }
}

/// A training run before its first step.
fn train_state(config: &ModelConfig, parameters: Vec<Vec<f32>>) -> TrainState {
    let average = parameters.clone();
    TrainState::new(config, &TrainConfig::default(), parameters, average)
}

/// An engine that has the arrays of a training run.
fn engine(device: Device, state: &mut TrainState) -> Box<dyn Engine> {
    let mut engine = device.engine(&state.config).expect("a model's shape");
    engine.load(state.lend_arrays()).expect("its own arrays");
    engine
}

/// Seconds of every one of `runs` training steps, after one that warms up; and the peak memory.
fn time_training(device: Device, start: State, runs: usize) -> Timing {
    let mut state = train_state(&start.config, start.parameters);
    let mut engine = engine(device, &mut state);
    timing(runs, |run| {
        let dropout = Dropout {
            rate: 0.5,
            seed: run as u64,
            first: 0,
        };
        let update = next_step(&state, &TrainConfig::default(), None);
        let nats = engine.step(of_images(&start.images), Some(dropout), &update);
        black_box(nats.expect("a number"));
        (state.step, state.learning_rate) = (update.adam.step, update.adam.learning_rate);
    })
}

/// The same of evaluating the batch.
fn time_evaluation(device: Device, start: State, runs: usize) -> Timing {
    let network = Network::new(&start.config, &start.parameters, &device).unwrap();
    timing(runs, |_| {
        black_box(network.nats_per_image(of_images(&start.images)).is_ok());
    })
}

struct Timing {
    seconds: Vec<f64>,
    peak_bytes: Option<u64>,
}

impl Timing {
    fn median(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }

    /// Not a number where it is not known.
    fn megabytes(&self) -> f64 {
        self.peak_bytes.map_or(f64::NAN, |bytes| bytes as f64 / 1e6)
    }
}

fn timing(runs: usize, mut f: impl FnMut(usize)) -> Timing {
    f(0);
    reset_peak();
    let seconds = (1..=runs).map(|run| {
        let start = Instant::now();
        f(run);
        start.elapsed().as_secs_f64()
    });
    Timing {
        seconds: seconds.collect(),
        peak_bytes: peak_bytes(),
    }
}

/// Forgets how much memory setting up took.
fn reset_peak() {
    // Where it cannot be reset, the peak of the whole process is what there is.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The most memory that was resident at a time, on Linux.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

fn table(device: Device, sizes: &[Size]) {
    println!("{} threads", rayon::current_num_threads());
    println!(
        "filters resnet mixtures batch   training images/s  GFLOP/s     MB   \
         evaluation images/s  GFLOP/s     MB"
    );
    for &size in sizes {
        let [nr_filters, nr_resnet, nr_logistic_mix, batch] = size;
        let layout = Layout::new(&start(size).config);
        let gflop = 2e-9 * layout.multiply_adds as f64 * batch as f64;
        let runs = if nr_filters > 100 { 3 } else { 15 };
        let column = |timing: Timing, gflop: f64| {
            let seconds = timing.median();
            let megabytes = timing.megabytes();
            let images = batch as f64 / seconds;
            format!("{images:19.1} {:8.1} {megabytes:6.0}", gflop / seconds)
        };
        println!(
            "{nr_filters:7} {nr_resnet:6} {nr_logistic_mix:8} {batch:5} {} {:>2}{}",
            column(time_training(device, start(size), runs), 3.0 * gflop),
            "",
            column(time_evaluation(device, start(size), runs), gflop),
        );
    }
}

fn time(device: Device, what: &str, file: &Path, runs: usize) -> Result<(), Box<dyn Error>> {
    let start = read(file)?;
    let timing = match what {
        "training" => time_training(device, start, runs),
        "evaluation" => time_evaluation(device, start, runs),
        _ => return Err(USAGE.into()),
    };
    let Timing {
        seconds,
        peak_bytes,
    } = timing;
    let line = serde_json::json!({ "seconds": seconds, "peak_bytes": peak_bytes });
    println!("{line}");
    Ok(())
}

/// Little-endian values.
fn bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Writes `images` (u8 NHWC), the parameters under the original's names, `nats` (of the batch,
/// f64), and by the same names behind `gradient/`, `stepped/` and `average/` the gradients of the
/// nats and the parameters and averages after one step, all without dropout. The model's shape is
/// in the metadata under `config`.
fn exchange(file: &Path, size: Size) -> Result<(), Box<dyn Error>> {
    let State {
        config,
        images,
        parameters,
    } = start(size);
    let mut state = train_state(&config, parameters.clone());
    let mut engine = engine(Device::CPU, &mut state);
    let update = next_step(&state, &TrainConfig::default(), None);
    let nats = engine.backward(of_images(&images), None)?;
    let gradients = engine.gradients()?;
    engine.update(&update)?;
    state.take_arrays(engine.unload()?);

    let image_shape = vec![size[3], config.height, config.width, config.channels];
    let mut tensors = vec![
        ("images".to_owned(), Dtype::U8, image_shape, images),
        (
            "nats".to_owned(),
            Dtype::F64,
            vec![],
            nats.to_le_bytes().to_vec(),
        ),
    ];
    for (prefix, values) in [
        ("", &parameters),
        ("gradient/", &gradients),
        ("stepped/", &state.parameters),
        ("average/", &state.average),
    ] {
        for (parameter, values) in Layout::new(&config).parameters.into_iter().zip(values) {
            let name = format!("{prefix}{}", parameter.name);
            tensors.push((name, Dtype::F32, parameter.shape, bytes(values)));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    let metadata = HashMap::from([("config".to_owned(), serde_json::to_string(&config)?)]);
    safetensors::serialize_to_file(views, Some(metadata), file)?;
    Ok(())
}

/// Writes `images` \[N, H, W, C\] (u8), the training images of CIFAR-10, and `order` \[EPOCHS, N\]
/// (u32), the order in which each epoch of a run uses them.
fn order(file: &Path, seed: u64, epochs: u64) -> Result<(), Box<dyn Error>> {
    let data = Dataset::open(&DataConfig::default(), Split::Train)?;
    let n = data.len();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    data.read(&(0..n).collect::<Vec<_>>(), &mut images, &mut labels)?;
    let order = (0..epochs).flat_map(|epoch| data.epoch_order(seed, epoch));
    let order: Vec<u8> = order
        .flat_map(|image| (image as u32).to_le_bytes())
        .collect();
    let image_shape = vec![n, data.height(), data.width(), data.channels()];
    let views = [
        ("images", TensorView::new(Dtype::U8, image_shape, &images)?),
        (
            "order",
            TensorView::new(Dtype::U32, vec![epochs as usize, n], &order)?,
        ),
    ];
    Ok(safetensors::serialize_to_file(views, None, file)?)
}

/// Reads the model, images and parameters of a file that [`exchange`] wrote.
fn read(file: &Path) -> Result<State, Box<dyn Error>> {
    let file = std::fs::read(file)?;
    let (_, header) = SafeTensors::read_metadata(&file)?;
    let metadata = header.metadata().as_ref();
    let config = metadata.and_then(|m| m.get("config")).ok_or("no config")?;
    let config: ModelConfig = serde_json::from_str(config)?;
    let tensors = SafeTensors::deserialize(&file)?;
    let parameters = Layout::new(&config)
        .parameters
        .into_iter()
        .map(|parameter| {
            let tensor = tensors.tensor(&parameter.name)?;
            let values = tensor.data().chunks_exact(4);
            Ok(values
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect())
        });
    Ok(State {
        images: tensors.tensor("images")?.data().to_vec(),
        parameters: parameters.collect::<Result<_, Box<dyn Error>>>()?,
        config,
    })
}
