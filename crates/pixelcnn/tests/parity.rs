//! The original's own numbers are the judge: initialisation, every recorded feature map, output,
//! loss, gradients, steps and averages, within the tolerances that a faithful f32 implementation
//! meets (`golden_f64` is the original's source run in f64). All devices of this machine are judged, as far as the
//! build knows them.

use pixelcnn::device::{self, Device};
use pixelcnn::network::Layout;
use pixelcnn::network::{self, Batch, Network};
use pixelcnn::train::config::TrainConfig;
use pixelcnn::train::next_step;
use pixelcnn::train::state::TrainState;
use pixelcnn::{ModelConfig, reference};
use safetensors::{Dtype, SafeTensors};

fn config() -> ModelConfig {
    ModelConfig {
        height: 8,
        width: 8,
        nr_resnet: 1,
        nr_filters: 8,
        nr_logistic_mix: 5,
        ..ModelConfig::default()
    }
}

struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Golden {
        let path = format!(
            "{}/tests/golden/{name}.safetensors",
            env!("CARGO_MANIFEST_DIR")
        );
        Golden(std::fs::read(path).unwrap())
    }

    fn bytes(&self, key: &str) -> (Dtype, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors
            .tensor(key)
            .unwrap_or_else(|_| panic!("{key} is in the golden file"));
        (tensor.dtype(), tensor.data().to_vec())
    }

    fn values(&self, key: &str) -> Vec<f64> {
        match self.bytes(key) {
            (Dtype::F32, bytes) => bytes
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            (Dtype::F64, bytes) => bytes
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            (dtype, _) => panic!("{key} is {dtype:?}"),
        }
    }

    /// All parameters under a prefix.
    fn parameters(&self, prefix: &str) -> Vec<Vec<f32>> {
        let layout = Layout::new(&config());
        let names = layout
            .parameters
            .iter()
            .map(|p| format!("{prefix}/{}", p.name));
        names
            .map(|key| self.values(&key).into_iter().map(|v| v as f32).collect())
            .collect()
    }
}

/// Training batch `k` of the golden run: images 4(k-1) to 4k.
fn images(golden: &Golden, k: usize) -> Vec<u8> {
    let size = 4 * config().dims();
    golden.bytes("images_u8").1[(k - 1) * size..k * size].to_vec()
}

fn worst<T: Copy + Into<f64>>(ours: &[T], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let differences = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| ((*a).into() - b).abs());
    differences.fold(
        0.0,
        |worst, d| if d > worst || d.is_nan() { d } else { worst },
    )
}

/// What the parameters give for a batch, by the reference.
fn plainly(parameters: &[Vec<f32>], batch: Batch) -> reference::Outcome {
    let widen = |values: &Vec<f32>| values.iter().copied().map(f64::from).collect();
    let parameters: Vec<Vec<f64>> = parameters.iter().map(widen).collect();
    reference::run(&config(), &parameters, batch, None).unwrap()
}

fn network(parameters: &[Vec<f32>], device: Device) -> Network {
    Network::new(&config(), parameters, &device).unwrap()
}

/// The CPU, and all others that are there.
fn on_every_device(test: impl Fn(Device)) {
    let found = device::devices().unwrap();
    // Debian's mesa-vulkan-drivers has an adapter for machines without a GPU.
    assert!(found.len() > 1 || !cfg!(feature = "wgpu"), "{found:?}");
    for found in found {
        println!("on {}", found.device);
        test(found.device);
    }
}

/// A training run before its first step.
fn start(parameters: Vec<Vec<f32>>, average: Vec<Vec<f32>>) -> TrainState {
    TrainState::new(&config(), &TrainConfig::default(), parameters, average)
}

#[test]
fn data_dependent_initialisation() {
    on_every_device(data_dependent_initialisation_on);
}

fn data_dependent_initialisation_on(device: Device) {
    let golden = Golden::open("golden_f64");
    let f32s = Golden::open("golden_f32");
    let images = images(&f32s, 1);
    let batch = Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    };
    let mut parameters = f32s.parameters("before");
    let out = network::initialise(&config(), &mut parameters, batch, None, &device).unwrap();
    let layout = Layout::new(&config());
    for (ours, parameter) in parameters.iter().zip(&layout.parameters) {
        let theirs = golden.values(&format!("after/{}", parameter.name));
        let difference = worst(ours, &theirs);
        assert!(difference < 2e-6, "{}: {difference}", parameter.name);
    }
    let difference = worst(&out, &golden.values("init_pass_out"));
    assert!(
        difference < 5e-6,
        "output of the initialisation pass: {difference}"
    );
}

#[test]
fn output_and_feature_maps() {
    on_every_device(output_and_feature_maps_on);
}

fn output_and_feature_maps_on(device: Device) {
    let golden = Golden::open("golden_f64");
    let maps = Golden::open("activations_f32");
    let images = images(&Golden::open("golden_f32"), 1);
    let batch = Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    };
    let parameters = golden.parameters("after");
    let ours = network(&parameters, device).feature_maps(batch).unwrap();
    let plain = plainly(&parameters, batch);
    assert_eq!([ours.len(), plain.feature_maps.len()], [22; 2]);
    for (i, (map, plain)) in ours.iter().zip(&plain.feature_maps).enumerate() {
        let theirs = maps.values(&format!("act/{i:02}"));
        for difference in [worst(map, &theirs), worst(plain, &theirs)] {
            assert!(difference < 1e-5, "feature map {i}: {difference}");
        }
    }
    let (ours, theirs) = (
        network(&parameters, device).logits(batch).unwrap(),
        golden.values("out"),
    );
    for difference in [worst(&ours, &theirs), worst(&plain.logits, &theirs)] {
        assert!(difference < 5e-6, "output: {difference}");
    }
}

#[test]
fn loss_and_gradients() {
    on_every_device(loss_and_gradients_on);
}

fn loss_and_gradients_on(device: Device) {
    let golden = Golden::open("golden_f64");
    let images = images(&Golden::open("golden_f32"), 1);
    let batch = Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    };
    let loss = golden.values("loss")[0];
    let parameters = golden.parameters("after");
    let nats = network(&parameters, device).nats_per_image(batch).unwrap();
    let mut engine = device.engine(&config()).unwrap();
    let state = start(parameters.clone(), parameters.clone()).lend_arrays();
    engine.load(state).unwrap();
    let trained = engine.backward(batch, None).unwrap();
    let plain = plainly(&parameters, batch);
    for nats in [nats.iter().sum(), trained, plain.nats.iter().sum()] {
        assert!((nats / loss - 1.0).abs() < 1e-6, "{nats}, not {loss}");
        let bits = config().bits_per_dim(nats / 4.0);
        assert!(
            (bits - golden.values("bpd")[0]).abs() < 1e-5,
            "{bits} bits/dim"
        );
    }
    let ours = engine.gradients().unwrap();
    let gradients = ours.iter().zip(&plain.gradients);
    for ((ours, plain), parameter) in gradients.zip(&Layout::new(&config()).parameters) {
        let theirs = golden.values(&format!("grad/{}", parameter.name));
        let norm = theirs.iter().map(|v| v * v).sum::<f64>().sqrt();
        let distance = |ours: &mut dyn Iterator<Item = f64>| {
            let difference = ours.zip(&theirs).map(|(a, b)| (a - b).powi(2));
            difference.sum::<f64>().sqrt() / norm
        };
        // Where a logistic is narrow, the last bit of one output moves every gradient by 3e-4.
        let difference = distance(&mut ours.iter().copied().map(f64::from));
        assert!(
            difference < 4e-4,
            "{}: {difference} of the norm",
            parameter.name
        );
        let difference = distance(&mut plain.iter().copied());
        assert!(
            difference < 4e-4,
            "{}, plainly: {difference}",
            parameter.name
        );
    }
}

#[test]
fn three_steps_and_their_averages() {
    on_every_device(three_steps_and_their_averages_on);
}

fn three_steps_and_their_averages_on(device: Device) {
    let golden = Golden::open("golden_f64");
    let f32s = Golden::open("golden_f32");
    let layout = Layout::new(&config());
    let train = TrainConfig::default();
    // The original's average starts before the data-dependent initialisation.
    let mut state = start(golden.parameters("after"), f32s.parameters("before"));
    let mut engine = device.engine(&config()).unwrap();
    let bits = |parameters: &[Vec<f32>], k| {
        let images = images(&f32s, k);
        let batch = Batch {
            images: &images,
            labels: &[],
            ..Batch::default()
        };
        let nats = network(parameters, device).nats_per_image(batch).unwrap();
        config().bits_per_dim(nats.iter().sum::<f64>() / 4.0)
    };
    let close = |what: &str, ours: f64, theirs: f64| {
        assert!(
            (ours / theirs - 1.0).abs() < 2e-6,
            "{what}: {ours}, not {theirs}"
        );
    };
    // Where a gradient is nearly nothing, its rounding decides how far Adam goes.
    let furthest = if device == Device::CPU { 3e-4 } else { 1e-3 };
    for k in 1..=3 {
        close(
            "before the step",
            bits(&state.parameters, k),
            golden.values("train_bpd")[k - 1],
        );
        let images = images(&f32s, k);
        let batch = Batch {
            images: &images,
            labels: &[],
            ..Batch::default()
        };
        let update = next_step(&state, &train, None);
        engine.load(state.lend_arrays()).unwrap();
        engine.step(batch, None, &update).unwrap();
        state.take_arrays(engine.unload().unwrap());
        (state.step, state.learning_rate) = (update.adam.step, update.adam.learning_rate);
        if k == 2 {
            continue;
        }
        let (mut elements, mut far) = (0, 0);
        for (i, parameter) in layout.parameters.iter().enumerate() {
            let theirs = golden.values(&format!("step{k}/{}", parameter.name));
            let difference = worst(&state.parameters[i], &theirs);
            assert!(
                difference < furthest,
                "step {k}, {}: {difference}",
                parameter.name
            );
            let pairs = state.parameters[i].iter().zip(&theirs);
            far += pairs
                .filter(|(a, b)| (f64::from(**a) - **b).abs() > 2e-5)
                .count();
            elements += theirs.len();
            // The original's average reads a parameter before or after the step, whichever its
            // graph runs first: 5e-4 of a step's difference each time, 1e-6 is allowed for it.
            let averages = if k == 1 { &f32s } else { &golden };
            let theirs = averages.values(&format!("step{k}_ema/{}", parameter.name));
            let difference = worst(&state.average[i], &theirs);
            assert!(
                difference < 1.5e-6 + 1e-6,
                "average, step {k}, {}: {difference}",
                parameter.name
            );
        }
        assert!(
            far * 1000 <= elements,
            "step {k}: {far} of {elements} elements are off"
        );
        close(
            "after the step",
            bits(&state.parameters, 1),
            golden.values(&format!("bpd_raw/step{k}"))[0],
        );
        close(
            "averaged",
            bits(&state.average, 1),
            golden.values(&format!("bpd_ema/step{k}"))[0],
        );
    }
}
