//! The original's own numbers are the judge: initialisation, every recorded feature map, output,
//! loss, gradients, steps and averages, within the tolerances that a faithful f32 implementation
//! meets (`golden_f64` is the original's source run in f64).

use pixelcnn::ModelConfig;
use pixelcnn::model::{self, Batch, Network};
use pixelcnn::network::Layout;
use pixelcnn::ops::Engine;
use pixelcnn::train::checkpoint::{Moments, TrainState};
use pixelcnn::train::config::TrainConfig;
use pixelcnn::train::update;
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

fn worst(ours: &[f32], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let differences = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| (f64::from(*a) - b).abs());
    differences.fold(
        0.0,
        |worst, d| if d > worst || d.is_nan() { d } else { worst },
    )
}

fn engines(parameters: &[Vec<f32>]) -> [(Engine, Network<'_>); 2] {
    let device = burn::tensor::Device::flex();
    [Engine::Kernels, Engine::Portable].map(|engine| {
        let network = Network::with_engine(&config(), parameters, &device, engine);
        (engine, network)
    })
}

#[test]
fn data_dependent_initialisation() {
    let golden = Golden::open("golden_f64");
    let f32s = Golden::open("golden_f32");
    let images = images(&f32s, 1);
    let batch = Batch {
        images: &images,
        labels: &[],
    };
    let mut parameters = f32s.parameters("before");
    let device = burn::tensor::Device::flex();
    let out = model::initialise(&config(), &mut parameters, batch, None, &device);
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
    let golden = Golden::open("golden_f64");
    let maps = Golden::open("activations_f32");
    let images = images(&Golden::open("golden_f32"), 1);
    let batch = Batch {
        images: &images,
        labels: &[],
    };
    for (engine, network) in engines(&golden.parameters("after")) {
        let ours = network.feature_maps(batch);
        assert_eq!(ours.len(), 22);
        for (i, map) in ours.iter().enumerate() {
            let difference = worst(map, &maps.values(&format!("act/{i:02}")));
            assert!(
                difference < 1e-5,
                "{engine:?}, feature map {i}: {difference}"
            );
        }
        let difference = worst(&network.logits(batch), &golden.values("out"));
        assert!(difference < 5e-6, "{engine:?}, output: {difference}");
    }
}

#[test]
fn loss_and_gradients() {
    let golden = Golden::open("golden_f64");
    let images = images(&Golden::open("golden_f32"), 1);
    let batch = Batch {
        images: &images,
        labels: &[],
    };
    let loss = golden.values("loss")[0];
    for (engine, network) in engines(&golden.parameters("after")) {
        let nats: f64 = network.nats_per_image(batch).iter().sum();
        assert!(
            (nats / loss - 1.0).abs() < 1e-6,
            "{engine:?}: {nats}, not {loss}"
        );
        let ours = network.gradients(batch, None);
        assert!(
            (ours.nats / loss - 1.0).abs() < 1e-6,
            "{engine:?}: {}",
            ours.nats
        );
        let bits = config().bits_per_dim(ours.nats / 4.0);
        assert!(
            (bits - golden.values("bpd")[0]).abs() < 1e-5,
            "{engine:?}: {bits} bits/dim"
        );
        for (ours, parameter) in ours
            .gradients
            .iter()
            .zip(&Layout::new(&config()).parameters)
        {
            let theirs = golden.values(&format!("grad/{}", parameter.name));
            let norm = theirs.iter().map(|v| v * v).sum::<f64>().sqrt();
            let difference = ours
                .iter()
                .zip(&theirs)
                .map(|(a, b)| (f64::from(*a) - b).powi(2));
            let difference = difference.sum::<f64>().sqrt() / norm;
            // Where a logistic is narrow, the last bit of one output moves every gradient by 3e-4:
            // the kernels happen to have it as the f64 run has, Burn's operations not.
            let tolerance = match engine {
                Engine::Kernels => 4e-4,
                Engine::Portable => 8e-4,
            };
            assert!(
                difference < tolerance,
                "{engine:?}, {}: {difference} of the norm",
                parameter.name
            );
        }
    }
}

#[test]
fn three_steps_and_their_averages() {
    let golden = Golden::open("golden_f64");
    let f32s = Golden::open("golden_f32");
    let layout = Layout::new(&config());
    let train = TrainConfig::default();
    let device = burn::tensor::Device::flex();
    let mut state = TrainState {
        config: config(),
        step: 0,
        epoch: 0,
        position: 0,
        learning_rate: train.learning_rate,
        seed: 1,
        images_seen: 0,
        seconds: 0.0,
        last_evaluation: None,
        best: None,
        parameters: golden.parameters("after"),
        // The original's average starts before the data-dependent initialisation.
        average: f32s.parameters("before"),
        moments: Some(Moments::zeros(&layout)),
    };
    let bits = |parameters: &[Vec<f32>], k| {
        let images = images(&f32s, k);
        let batch = Batch {
            images: &images,
            labels: &[],
        };
        let network = Network::new(&config(), parameters, &device);
        config().bits_per_dim(network.nats_per_image(batch).iter().sum::<f64>() / 4.0)
    };
    let close = |what: &str, ours: f64, theirs: f64| {
        assert!(
            (ours / theirs - 1.0).abs() < 2e-6,
            "{what}: {ours}, not {theirs}"
        );
    };
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
        };
        let network = Network::new(&config(), &state.parameters, &device);
        let gradients = network.gradients(batch, None).gradients;
        update(&mut state, &train, &gradients);
        if k == 2 {
            continue;
        }
        let (mut elements, mut far) = (0, 0);
        for (i, parameter) in layout.parameters.iter().enumerate() {
            let theirs = golden.values(&format!("step{k}/{}", parameter.name));
            let difference = worst(&state.parameters[i], &theirs);
            assert!(
                difference < 3e-4,
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
