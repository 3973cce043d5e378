//! Weights in and out: the original's checkpoints and PyTorch's state dicts give what they gave
//! there, what is exported comes back bit for bit, and damaged or hostile files are refused.

mod torch;

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use pixelcnn::device::Device;
use pixelcnn::network::Layout;
use pixelcnn::network::{Batch, Network, draw_parameters};
use pixelcnn::train::config::TrainConfig;
use pixelcnn::train::next_step;
use pixelcnn::train::state::{Moments, TrainState, Unrecorded};
use pixelcnn::weights::safetensors::Precision;
use pixelcnn::weights::{
    Fault, Imported, Tensor, Tensors, Unsaid, WeightsError, hub, npz, original, port, pytorch,
    tensorflow,
};
use pixelcnn::{ModelConfig, Nonlinearity};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use torch::{Py, count, dict, others, save, save_legacy, single, text};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A tensor of a golden safetensors file as f64.
fn values(name: &str, key: &str) -> Vec<f64> {
    let file = fs::read(golden(name)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let bytes = tensors.tensor(key).unwrap().data().to_vec();
    let floats = bytes.chunks_exact(4);
    floats
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
        .collect()
}

fn images(name: &str, count: usize) -> Vec<u8> {
    let file = fs::read(golden(name)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let all = tensors.tensor("images_u8").unwrap().data().to_vec();
    all[..count * 8 * 8 * 3].to_vec()
}

fn trained(imported: Imported) -> TrainState {
    TrainState::of(imported, &TrainConfig::default())
}

/// The training that goes on from a file.
fn import(path: &Path, unsaid: &Unsaid) -> Result<TrainState, WeightsError> {
    Ok(trained(pixelcnn::weights::read(path, unsaid)?))
}

/// The golden checkpoints were trained on images of 8x8.
fn unsaid() -> Unsaid {
    Unsaid {
        size: Some([8, 8]),
        ..Unsaid::default()
    }
}

fn bits_per_dim(state: &TrainState, parameters: &[Vec<f32>]) -> f64 {
    let images = images("golden_f32.safetensors", 4);
    let network = Network::new(&state.config, parameters, &Device::CPU).unwrap();
    let nats = network.nats_per_image(Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    });
    let nats = nats.unwrap();
    state.config.bits_per_dim(nats.iter().sum::<f64>() / 4.0)
}

/// A state of random numbers.
fn random_state(config: &ModelConfig, step: u64) -> TrainState {
    let mut random = ChaCha8Rng::seed_from_u64(step);
    let layout = Layout::new(config);
    let mut array = || -> Vec<Vec<f32>> {
        let parameters = layout.parameters.iter();
        parameters
            .map(|p| {
                (0..p.len())
                    .map(|_| random.random_range(-1.0..1.0))
                    .collect()
            })
            .collect()
    };
    let train = TrainConfig::default();
    TrainState {
        config: config.clone(),
        step,
        epoch: 0,
        position: 0,
        learning_rate: (0..step).fold(1e-3, |rate, _| rate * train.learning_rate_decay),
        seed: train.seed,
        images_seen: step * train.batch_size as u64,
        seconds: 0.0,
        last_step: None,
        last_evaluation: None,
        best: None,
        unrecorded: Unrecorded::default(),
        run: None,
        class_names: Vec::new(),
        origin: None,
        parameters: array(),
        average: array(),
        moments: Some(Moments {
            first: array(),
            second: array(),
        }),
    }
}

fn tiny() -> ModelConfig {
    ModelConfig {
        height: 8,
        width: 8,
        nr_resnet: 1,
        nr_filters: 1,
        nr_logistic_mix: 1,
        ..ModelConfig::default()
    }
}

fn of(config: &ModelConfig) -> Unsaid {
    Unsaid {
        size: Some([config.height, config.width]),
        nonlinearity: Some(config.nonlinearity),
    }
}

const V1: &str = "tf_checkpoint_v1/params_cifar.ckpt";
const V2: &str = "tf_checkpoint_v2/params_cifar.ckpt";

#[test]
fn every_tensor_of_the_originals_checkpoints() {
    let file = fs::read(golden("tf_checkpoint_v2/tensors.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();
    let v2 = tensorflow::read_v2(&golden(V2), &mut Vec::new()).unwrap();
    assert_eq!(v2.len(), 685);
    assert_eq!(v2.len(), expected.len());
    for (name, tensor) in &v2 {
        let theirs = expected.tensor(name).unwrap();
        assert_eq!(tensor.shape, theirs.shape(), "{name}");
        let bytes: Vec<u8> = tensor.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(bytes, theirs.data(), "{name}");
    }
    let v1 = tensorflow::v1(fs::File::open(golden(V1)).unwrap(), &mut Vec::new()).unwrap();
    assert!(v1.keys().eq(v2.keys()));
    for (name, tensor) in &v1 {
        assert_eq!(tensor.shape, v2[name].shape, "{name}");
        let pairs = tensor.values.iter().zip(&v2[name].values);
        // Two runs of the original, on one thread each.
        for (a, b) in pairs {
            assert!((a - b).abs() <= 3e-6 * b.abs().max(1.0), "{name}: {a}, {b}");
        }
    }
}

#[test]
fn the_originals_checkpoints_give_its_bits_per_dim() {
    for name in [
        V1,
        V2,
        &format!("{V2}.index"),
        &format!("{V2}.data-00000-of-00001"),
    ] {
        let state = import(&golden(name), &unsaid()).unwrap();
        let expected = ModelConfig {
            height: 8,
            width: 8,
            nr_resnet: 1,
            nr_filters: 8,
            nr_logistic_mix: 5,
            ..ModelConfig::default()
        };
        assert_eq!(state.config, expected);
        assert_eq!((state.step, state.images_seen), (3, 3 * 128));
        let decay = 0.999_995;
        assert_eq!(state.learning_rate, 1e-3 * decay * decay * decay);
        for (parameters, key) in [
            (&state.average, "bpd_ema/step3"),
            (&state.parameters, "bpd_raw/step3"),
        ] {
            let ours = bits_per_dim(&state, parameters);
            let theirs = values("golden_f32.safetensors", key)[0];
            assert!(
                (ours / theirs - 1.0).abs() < 2e-6,
                "{key}: {ours}, {theirs}"
            );
        }
        let moments = state.moments.unwrap();
        assert!(moments.second.iter().flatten().all(|&square| square >= 0.0));
        assert!(moments.first.iter().flatten().any(|&mean| mean < 0.0));
    }
}

/// Three steps on batches of four of the golden images.
fn three_steps(state: &mut TrainState) {
    let images = images("golden_f32.safetensors", 12);
    let mut engine = Device::CPU.engine(&state.config).unwrap();
    engine.load(state.lend_arrays()).unwrap();
    for images in images.chunks(images.len() / 3) {
        let batch = Batch {
            images,
            labels: &[],
            ..Batch::default()
        };
        let update = next_step(state, &TrainConfig::default(), None);
        engine.step(batch, None, &update).unwrap();
        (state.step, state.learning_rate) = (update.adam.step, update.adam.learning_rate);
    }
    state.take_arrays(engine.unload().unwrap());
}

#[test]
fn three_more_steps_equal_a_run_that_never_left() {
    // The checkpoint's state put together by hand.
    let file = fs::read(golden("tf_checkpoint_v2/tensors.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut by_hand = import(&golden(V2), &unsaid()).unwrap();
    let layout = Layout::new(&by_hand.config);
    let array = |name: &dyn Fn(usize, &str) -> String| -> Vec<Vec<f32>> {
        let parameters = layout.parameters.iter().enumerate();
        let name = |(i, p): (usize, &pixelcnn::network::Parameter)| name(i, &p.name);
        let bytes = parameters.map(|p| tensors.tensor(&name(p)).unwrap().data().to_vec());
        let floats = |bytes: Vec<u8>| {
            bytes
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect()
        };
        bytes.map(floats).collect()
    };
    let mut imported = by_hand.clone();
    by_hand.parameters = array(&|_, name| name.to_owned());
    by_hand.average = array(&|_, name| format!("{name}/ExponentialMovingAverage"));
    by_hand.moments = Some(Moments {
        second: array(&|i, _| format!("Variable_{}", 2 * i + 1)),
        first: array(&|i, _| format!("Variable_{}", 2 * i + 2)),
    });
    three_steps(&mut by_hand);
    three_steps(&mut imported);
    assert_eq!(imported, by_hand);

    // Out and in again in the middle.
    let folder = tempfile::tempdir().unwrap();
    let mut left = import(&golden(V1), &unsaid()).unwrap();
    let mut stayed = left.clone();
    three_steps(&mut left);
    let variables = original::variables(left.optimized().unwrap(), 128, 1).unwrap();
    tensorflow::write_v2(folder.path(), "params_cifar.ckpt", variables).unwrap();
    let mut left = import(&folder.path().join("params_cifar.ckpt"), &unsaid()).unwrap();
    three_steps(&mut left);
    three_steps(&mut stayed);
    three_steps(&mut stayed);
    assert_eq!((left.learning_rate, left.step), (stayed.learning_rate, 9));
    assert_eq!(left.parameters, stayed.parameters);
    assert_eq!(left.average, stayed.average);
    assert_eq!(left.moments, stayed.moments);
}

#[test]
fn exported_checkpoints_come_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let grey = ModelConfig {
        channels: 1,
        nr_classes: 3,
        nr_filters: 3,
        nonlinearity: Nonlinearity::Elu,
        ..tiny()
    };
    let larger = ModelConfig {
        height: 32,
        width: 12,
        nr_resnet: 3,
        nr_filters: 5,
        nr_logistic_mix: 4,
        nr_classes: 10,
        ..tiny()
    };
    let relu = ModelConfig {
        nonlinearity: Nonlinearity::Relu,
        ..tiny()
    };
    for (n, config) in [tiny(), grey, larger, relu].iter().enumerate() {
        let state = random_state(config, 7 * n as u64);
        let variables = original::variables(state.optimized().unwrap(), 128, 8).unwrap();
        let name = format!("model-{n}");
        tensorflow::write_v2(folder.path(), &name, variables).unwrap();
        let again = import(&folder.path().join(&name), &of(config)).unwrap();
        assert_eq!(again, state);

        let variables = original::variables(state.optimized().unwrap(), 128, 8).unwrap();
        let wholes = variables
            .iter()
            .filter(|v| matches!(v.values, tensorflow::Values::Int64(_)));
        assert_eq!(wholes.count(), if config.nr_classes > 0 { 8 } else { 0 });
    }
    let conditional = ModelConfig {
        nr_classes: 3,
        ..tiny()
    };
    let error =
        original::variables(random_state(&conditional, 1).optimized().unwrap(), 12, 8).unwrap_err();
    assert!(matches!(error, WeightsError::Gpus { .. }), "{error}");
}

/// The network's output on a file's images equals what PyTorch gave.
fn expect_output(state: &TrainState, file: &str, count: usize) {
    let images = images(file, count);
    let network = Network::new(&state.config, &state.parameters, &Device::CPU).unwrap();
    let batch = Batch {
        images: &images,
        labels: &[],
        ..Batch::default()
    };
    let (ours, theirs) = (network.logits(batch).unwrap(), values(file, "out"));
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((f64::from(*a) - b).abs() < 1e-5, "{a}, {b}");
    }
}

#[test]
fn pytorch_models_give_the_same_outputs() {
    for name in ["rgb.pth", "rgb_legacy.pth"] {
        let state = import(&golden("pytorch_port").join(name), &unsaid()).unwrap();
        assert_eq!(
            (state.config.nr_filters, state.config.nr_logistic_mix),
            (8, 5)
        );
        expect_output(&state, "pytorch_port/rgb_expected.safetensors", 4);
        assert_eq!(state.average, state.parameters);
        assert_eq!(state.step, 0);
        assert!(
            state
                .moments
                .unwrap()
                .second
                .iter()
                .flatten()
                .all(|&x| x == 0.0)
        );
    }
    let state = import(&golden("pytorch/benchmark.pth"), &unsaid()).unwrap();
    assert_eq!(
        (state.config.nr_filters, state.config.nr_logistic_mix),
        (4, 2)
    );
    expect_output(&state, "pytorch/benchmark_expected.safetensors", 2);
}

/// The tensors of the golden model of the port, under its names.
fn port_tensors() -> Tensors {
    read_pth(&fs::read(golden("pytorch_port/rgb.pth")).unwrap()).unwrap()
}

fn state_dict(tensors: &Tensors, name: impl Fn(&str) -> String) -> Py {
    let items = tensors.iter().map(|(key, t)| (text(name(key)), single(t)));
    Py::Ordered(items.collect())
}

/// What import finds in a file.
fn read_file(file: &[u8]) -> Result<Imported, WeightsError> {
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(path.path(), file).unwrap();
    pixelcnn::weights::read(path.path(), &unsaid())
}

/// The names of the layers since weight normalisation became a parametrization.
fn parametrized(name: &str) -> String {
    let weight = "parametrizations.weight.original";
    let name = name.replace("weight_g", &format!("{weight}0"));
    name.replace("weight_v", &format!("{weight}1"))
}

#[test]
fn state_dicts_are_found_as_they_come() {
    let tensors = port_tensors();
    let expected = import(&golden("pytorch_port/rgb.pth"), &unsaid()).unwrap();
    let named = |name: &dyn Fn(&str) -> String| state_dict(&tensors, name);
    let plain = || named(&|name| name.into());
    let before = |prefix: &str| named(&|name| format!("{prefix}{name}"));
    let all: Vec<String> = others()
        .into_iter()
        .map(|(key, _)| match key {
            Py::Text(key) => key,
            key => panic!("{key:?}"),
        })
        .collect();
    let with_others = |key: &str, model: Py| {
        let mut items = others();
        items.insert(2, (text(key), model));
        Py::Dict(items)
    };
    let parameters = tensors.iter().map(|(name, tensor)| {
        let tensor = Py::Parameter(Box::new(single(tensor)));
        (text(format!("model.{}", parametrized(name))), tensor)
    });
    let lightning = dict([
        ("epoch", Py::Int(3)),
        ("global_step", Py::Int(900)),
        ("pytorch-lightning_version", text("2.5.0")),
        ("state_dict", before("model._orig_mod.")),
        (
            "loops",
            dict([("fit_loop", dict([("state_dict", Py::Dict(Vec::new()))]))]),
        ),
        (
            "callbacks",
            dict([("ModelCheckpoint", dict([("best", count(3))]))]),
        ),
        ("optimizer_states", Py::List(vec![Py::Dict(others())])),
        (
            "hyper_parameters",
            Py::Object("lightning", "AttributeDict", Box::new(Py::None)),
        ),
    ]);
    let mut averaged = vec![(text("n_averaged"), count(17))];
    averaged.extend(
        tensors
            .iter()
            .map(|(name, t)| (text(format!("module.{name}")), single(t))),
    );
    let every_other = |name: &str| match name.len() % 2 {
        0 => parametrized(name),
        _ => name.into(),
    };
    let cases: Vec<(Py, &[&str])> = vec![
        (plain(), &[]),
        (named(&|name| parametrized(name)), &[]),
        (named(&every_other), &[]),
        (before("_orig_mod."), &[]),
        (before("module."), &[]),
        (before("module._orig_mod."), &[]),
        (before("_orig_mod.module."), &[]),
        (before("net.model._orig_mod.module._orig_mod."), &[]),
        (
            named(&|name| format!("_orig_mod.{}", parametrized(name))),
            &[],
        ),
        // A part of the model is compiled.
        (
            named(&|name| name.replace("up_layers.1.", "up_layers.1._orig_mod.")),
            &[],
        ),
        (Py::Dict(parameters.collect()), &[]),
        (Py::Ordered(averaged), &[]),
        (
            dict([("state_dict", plain()), ("epoch", Py::Int(12))]),
            &["epoch"],
        ),
        (
            dict([
                ("model_state_dict", plain()),
                ("loss", single(&tensors["u_init.conv.bias"])),
            ]),
            &["loss"],
        ),
        (dict([("ema", plain())]), &[]),
        (Py::Tuple(vec![Py::Int(3), plain(), Py::None]), &["0", "2"]),
        (
            dict([
                (
                    "last",
                    dict([("net", before("module.")), ("step", Py::Int(3))]),
                ),
                ("by", text("us")),
            ]),
            &["by", "last.step"],
        ),
        (
            lightning,
            &[
                "epoch",
                "global_step",
                "pytorch-lightning_version",
                "loops",
                "callbacks",
                "optimizer_states",
                "hyper_parameters",
            ],
        ),
    ];
    let names = |unused: &[&str]| {
        unused
            .iter()
            .map(|&name| name.to_owned())
            .collect::<Vec<_>>()
    };
    let mut cases: Vec<(Py, Vec<String>)> = cases
        .into_iter()
        .map(|(py, unused)| (py, names(unused)))
        .collect();
    for key in ["state_dict", "model", "net", "model_ema"] {
        cases.push((with_others(key, before("module.")), all.clone()));
    }
    for (case, unused) in cases {
        for file in [save(&case), save_legacy(&case)] {
            let found = read_file(&file).unwrap_or_else(|error| panic!("{error}: {case:.300?}"));
            assert_eq!(found.unused, unused);
            assert!(trained(found) == expected, "{case:.300?}");
        }
    }
    expect_output(&expected, "pytorch_port/rgb_expected.safetensors", 4);
}

/// The tensors, each value changed.
fn changed(tensors: &Tensors) -> Tensors {
    let change = |tensor: &Tensor| Tensor {
        shape: tensor.shape.clone(),
        values: tensor.values.iter().map(|v| 2.0 * v + 1.0).collect(),
    };
    let tensors = tensors.iter();
    tensors
        .map(|(name, tensor)| (name.clone(), change(tensor)))
        .collect()
}

#[test]
fn averages_beside_weights_are_theirs() {
    let weights = port_tensors();
    let averages = changed(&weights);
    let alone = |tensors: &Tensors| {
        read_file(&save(&state_dict(tensors, str::to_owned)))
            .unwrap()
            .arrays
            .parameters
    };
    let expected = (alone(&weights), alone(&averages));
    assert_ne!(expected.0, expected.1);
    let dict_of =
        |tensors: &Tensors, prefix: &str| state_dict(tensors, |name| format!("{prefix}{name}"));
    let both = |weights_at: &str, averages_at: &str| {
        let (Py::Ordered(mut all), Py::Ordered(averages)) = (
            dict_of(&weights, weights_at),
            dict_of(&averages, averages_at),
        ) else {
            unreachable!()
        };
        all.extend(averages);
        all
    };
    let mut averaged = both("model.", "averaged.module.");
    averaged.push((text("averaged.n_averaged"), count(17)));
    for case in [
        dict([
            ("ema", dict_of(&averages, "")),
            ("model", dict_of(&weights, "")),
        ]),
        dict([
            ("state_dict", dict_of(&weights, "")),
            ("state_dict_ema", dict_of(&averages, "module.")),
        ]),
        dict([
            ("model", dict_of(&weights, "")),
            ("EMA", dict([("shadow", dict_of(&averages, ""))])),
        ]),
        Py::Ordered(both("model.", "ema_model.")),
        Py::Ordered(both("", "swa.")),
        Py::Ordered(averaged),
    ] {
        let state = trained(read_file(&save(&case)).unwrap());
        assert!(state.parameters == expected.0, "{case:.300?}");
        assert!(state.average == expected.1, "{case:.300?}");
    }
}

#[test]
fn several_models_are_refused_by_name() {
    let (one, other) = (port_tensors(), changed(&port_tensors()));
    let dict_of = |tensors: &Tensors| state_dict(tensors, str::to_owned);
    for (keys, part) in [
        (
            ["model", "best"],
            "several models (\"model\", \"best\"): save",
        ),
        (["ema", "swa"], "several models (\"ema\", \"swa\"): save"),
    ] {
        let file = save(&Py::Dict(vec![
            (text(keys[0]), dict_of(&one)),
            (text(keys[1]), dict_of(&other)),
        ]));
        let error = read_file(&file).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let Py::Ordered(mut items) = dict_of(&one) else {
        unreachable!()
    };
    items.extend(
        other
            .iter()
            .map(|(name, t)| (text(format!("old.{name}")), single(t))),
    );
    let error = read_file(&save(&Py::Ordered(items)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("several models"), "{error}");
    let many = (0..9).map(|n| (Py::Int(n), dict_of(&one))).collect();
    let error = read_file(&save(&Py::Dict(many))).unwrap_err().to_string();
    assert!(error.contains("more weights than one"), "{error}");
}

#[test]
fn tensors_of_no_layer_are_named() {
    let tensors = port_tensors();
    let bias = || single(&tensors["u_init.conv.bias"]);
    let unknown = |name: &str, tensor: Py| (text(name), tensor);
    for (prefix, added, part) in [
        (
            "",
            unknown("extra.weight", bias()),
            "\"extra.weight\" is not part of the model",
        ),
        (
            "module.",
            unknown("module.norm.num_batches_tracked", count(5)),
            "\"module.norm.num_batches_tracked\" is not part",
        ),
        (
            "_orig_mod.",
            unknown("head.weight", bias()),
            "\"head.weight\" is not part",
        ),
        (
            "model.",
            unknown("loss.scale", count(1)),
            "\"loss.scale\" is not part",
        ),
        (
            "",
            unknown("u_init.conv.parametrizations.weight.original2", bias()),
            "original2\" is not part",
        ),
        (
            "",
            unknown("_orig_mod.u_init.conv.bias", bias()),
            "u_init.conv.bias\" is there twice",
        ),
        (
            "",
            unknown(
                "quantized",
                Py::Call("torch._utils", "_rebuild_qtensor", vec![]),
            ),
            "\"quantized\" is not part",
        ),
    ] {
        let Py::Ordered(mut items) = state_dict(&tensors, |name| format!("{prefix}{name}")) else {
            unreachable!()
        };
        items.push(added);
        let wrapped = dict([
            ("epoch", Py::Int(1)),
            ("state_dict", Py::Ordered(items.clone())),
        ]);
        for file in [
            save(&Py::Ordered(items)),
            save(&wrapped),
            save_legacy(&wrapped),
        ] {
            let error = read_file(&file).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
    for (renamed, part) in [
        ("u_init.conv.weight_v", "but no \"u_init.conv.weight_v\""),
        ("nin_out.lin_a.bias", "\"nin_out.lin_a.bias_2\" is not part"),
    ] {
        let name = |name: &str| name.replace(renamed, &format!("{renamed}_2"));
        let error = read_file(&save(&state_dict(&tensors, name)))
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut missing = tensors.clone();
    missing.remove("nin_out.lin_a.bias");
    missing.insert("n_averaged".into(), Tensor::default());
    let error = read_file(&save(&state_dict(&missing, str::to_owned)))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"nin_out.lin_a.bias\" is missing"),
        "{error}"
    );
    let of_no_kind = Py::Call("torch._utils", "_rebuild_qtensor", vec![]);
    let Py::Ordered(mut items) = state_dict(&tensors, str::to_owned) else {
        unreachable!()
    };
    items[0].1 = of_no_kind;
    let error = read_file(&save(&Py::Ordered(items)))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("is of a kind that is not read here"),
        "{error}"
    );
}

#[test]
fn weights_of_any_precision_come_in_single() {
    let tensors = port_tensors();
    let expected = import(&golden("pytorch_port/rgb.pth"), &unsaid()).unwrap();
    type Bytes = fn(f32) -> Vec<u8>;
    let cases: [(&str, Bytes, f32); 3] = [
        ("DoubleStorage", |v| f64::from(v).to_le_bytes().into(), 0.0),
        (
            "HalfStorage",
            |v| half::f16::from_f32(v).to_le_bytes().into(),
            1.0 / 2048.0,
        ),
        (
            "BFloat16Storage",
            |v| half::bf16::from_f32(v).to_le_bytes().into(),
            1.0 / 256.0,
        ),
    ];
    for (storage, bytes, rounding) in cases {
        let items = tensors.iter().map(|(name, tensor)| {
            let bytes = tensor.values.iter().flat_map(|&v| bytes(v)).collect();
            (text(name), Py::Tensor(storage, tensor.shape.clone(), bytes))
        });
        let model = dict([("model", Py::Ordered(items.collect()))]);
        for file in [save(&model), save_legacy(&model)] {
            let found = trained(read_file(&file).unwrap());
            let pairs = found.parameters.iter().flatten();
            let mut rounded = false;
            for (found, expected) in pairs.zip(expected.parameters.iter().flatten()) {
                // The transposed convolutions are made of many values.
                let bound = 2.0 * rounding * expected.abs().max(0.01);
                assert!(
                    (found - expected).abs() <= bound,
                    "{storage}: {found}, {expected}"
                );
                rounded |= found != expected;
            }
            assert_eq!(rounded, rounding > 0.0, "{storage}");
        }
    }
}

fn pth(name: &str) -> Vec<u8> {
    fs::read(golden("pytorch").join(name)).unwrap()
}

fn read_pth(file: &[u8]) -> Result<Tensors, Fault> {
    pytorch::read(Cursor::new(file), &mut Vec::new())
}

#[test]
fn views_are_gathered() {
    let range = |from: u32, to: u32| (from..to).map(|n| n as f32).collect::<Vec<_>>();
    let transposed = (0..24).map(|n| (n % 4 * 6 + n / 4) as f32).collect();
    let expected: [(&str, &[usize], Vec<f32>); 11] = [
        ("whole", &[2, 3, 4], range(0, 24)),
        ("transposed", &[6, 4], transposed),
        ("part", &[2, 3], vec![6., 8., 10., 12., 14., 16.]),
        ("offset", &[4], range(20, 24)),
        ("shared", &[4], range(0, 4)),
        ("scalar", &[], vec![7.0]),
        ("empty", &[0, 3], vec![]),
        ("parameter", &[2], vec![1.5, -2.5]),
        ("double", &[2], vec![0.1, -3.0]),
        ("half", &[2], vec![0.5, -65504.0]),
        ("bfloat", &[2], vec![1.0, -3.0]),
    ];
    for name in ["views.pth", "views_legacy.pth"] {
        let tensors = read_pth(&pth(name)).unwrap();
        assert_eq!(tensors.len(), expected.len());
        for (key, shape, values) in &expected {
            assert_eq!(tensors[*key].shape, *shape, "{key}");
            assert_eq!(tensors[*key].values, *values, "{key}");
        }
    }
}

#[test]
fn other_pickles_are_refused_by_name() {
    for (name, part) in [
        ("expanded.pth", "\"big\" reaches out of its storage"),
        (
            "whole_numbers.pth",
            "\"counts\" has no floating-point values",
        ),
        ("module.pth", "\"model.Conv\", which no state dict needs"),
    ] {
        let error = read_pth(&pth(name)).unwrap_err().to_string();
        assert!(error.contains(part), "{name}: {error}");
        assert!(!error.contains('\n'), "{name}: {error}");
    }
    for name in ["views.pth", "wrapped.pth"] {
        let error = port::to_original(read_pth(&pth(name)).unwrap()).unwrap_err();
        let part = "a layer \"bfloat\", but no \"u_init.conv.weight_v\"";
        assert!(error.to_string().contains(part), "{name}: {error}");
    }
    for (root, part) in [
        (Py::None, "it holds no tensors by name"),
        (Py::List(vec![count(1)]), "it holds no tensors by name"),
        (dict([("epoch", Py::Int(1))]), "it holds no tensors by name"),
        (
            dict([("model", Py::Object("model", "PixelCNN", Box::new(Py::None)))]),
            "\"model.PixelCNN\", which no state dict needs",
        ),
    ] {
        let error = read_pth(&save(&root)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// The tensors of a state under the original's names.
fn named(config: &ModelConfig) -> Tensors {
    let state = random_state(config, 3);
    let folder = tempfile::tempdir().unwrap();
    let variables = original::variables(state.optimized().unwrap(), 128, 8).unwrap();
    tensorflow::write_v2(folder.path(), "model", variables).unwrap();
    tensorflow::read_v2(&folder.path().join("model"), &mut Vec::new()).unwrap()
}

#[test]
fn other_models_are_refused_by_name() {
    type Change = fn(&mut Tensors);
    let cases: [(Change, &str); 9] = [
        (
            |t| drop(t.remove("model/conv2d_0/V")),
            "\"model/conv2d_0/V\" is missing",
        ),
        (
            |t| drop(t.remove("model/dense_3/g")),
            "\"model/dense_3/g\" is missing",
        ),
        (
            |t| drop(t.remove("model/dense_3/g/ExponentialMovingAverage")),
            "\"model/dense_3/g/ExponentialMovingAverage\" is missing",
        ),
        (|t| drop(t.remove("Variable_342")), "has no first moment"),
        (
            |t| drop(t.insert("extra".into(), Default::default())),
            "\"extra\" is not part",
        ),
        (
            |t| t.get_mut("model/conv2d_9/b").unwrap().shape.push(1),
            "\"model/conv2d_9/b\" has shape [1, 1], not [1]",
        ),
        (
            |t| t.get_mut("Variable").unwrap().values[0] = f32::NAN,
            "\"Variable\" is NaN",
        ),
        (
            |t| t.get_mut("Variable").unwrap().values[0] = 1e9,
            "\"Variable\" is 1000000000",
        ),
        (
            |t| {
                for n in 14..17 {
                    let tensor = t["model/dense_13/V"].clone();
                    t.insert(format!("model/dense_{n}/V"), tensor);
                }
            },
            "dense_13/V",
        ),
    ];
    let tensors = named(&tiny());
    original::state(tensors.clone(), &of(&tiny())).unwrap();
    for (change, part) in cases {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let error = original::state(tensors, &of(&tiny()))
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
    }

    // With the head of the energy distance.
    let energy = ModelConfig {
        energy_distance: true,
        nr_logistic_mix: 10,
        ..tiny()
    };
    let state = original::state(named(&energy), &of(&energy)).unwrap();
    assert_eq!(state.config, energy);

    // Weights alone, without averages or optimizer.
    let mut alone = tensors.clone();
    alone.retain(|name, _| !name.starts_with("Variable") && !name.ends_with("Average"));
    let state = original::state(alone, &of(&tiny())).unwrap();
    assert_eq!(
        (state.step, &state.arrays.average),
        (0, &state.arrays.parameters)
    );

    let elu = ModelConfig {
        nonlinearity: Nonlinearity::Elu,
        ..tiny()
    };
    let error = original::state(tensors, &of(&elu)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "is of a model with nonlinearity ConcatElu, not Elu"
    );
    let unsaid = Unsaid {
        nonlinearity: None,
        ..of(&elu)
    };
    let error = original::state(named(&elu), &unsaid).unwrap_err();
    assert!(matches!(error, Fault::Nonlinearity), "{error}");
}

/// What a checkpoint with these names gives, in TensorFlow's current form.
fn saved_as(
    tensors: &Tensors,
    name: impl Fn(&str) -> Option<String>,
) -> Result<TrainState, WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    let variables = tensors.iter().filter_map(|(own, tensor)| {
        Some(tensorflow::Variable {
            name: name(own)?,
            shape: tensor.shape.clone(),
            values: tensorflow::Values::Float(tensor.values[..].into()),
        })
    });
    tensorflow::write_v2(folder.path(), "x", variables.collect()).unwrap();
    import(&folder.path().join("x"), &of(&tiny()))
}

const AVERAGE: &str = "/ExponentialMovingAverage";

#[test]
fn scopes_before_the_originals_names_are_taken_off() {
    let tensors = named(&tiny());
    let expected = saved_as(&tensors, |name| Some(name.into())).unwrap();
    let cases: [fn(&str) -> String; 6] = [
        |name| format!("tower_0/{name}"),
        |name| name.replace("model/", "tower_0/model/"),
        |name| name.replace("model/", "model_1/"),
        |name| name.replace("model/", ""),
        // The averages' own scope.
        |name| match name.strip_suffix(AVERAGE) {
            Some(name) => format!("ema/tower_0/{name}{AVERAGE}"),
            None => format!("tower_0/{name}"),
        },
        |name| name.replace("Variable", "training/adam/Variable"),
    ];
    for case in cases {
        let state = saved_as(&tensors, |name| Some(case(name))).unwrap();
        assert!(state == expected);
    }
    let without = |name: &str| (!name.contains("Variable")).then(|| format!("tower_0/{name}"));
    let state = saved_as(&tensors, without).unwrap();
    assert_eq!((state.step, state.images_seen), (0, 0));
    assert!(state.parameters == expected.parameters && state.average == expected.average);

    for (renamed, part) in [
        ("model/dense_3/g", "\"model/dense_3/g\" is missing"),
        ("model/conv2d_9/V", "\"model/conv2d_9/V\" is missing"),
        ("model/conv2d_0/V", "\"model/conv2d_0/V\" is missing"),
    ] {
        let name = |name: &str| match name == renamed {
            true => Some(format!("tower_1/{name}")),
            false => Some(format!("tower_0/{name}")),
        };
        let error = saved_as(&tensors, name).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut more = tensors.clone();
    more.insert(
        "model/batch_norm/gamma".into(),
        tensors["model/dense_3/g"].clone(),
    );
    let error = saved_as(&more, |name| Some(format!("tower_0/{name}"))).unwrap_err();
    let part = "\"tower_0/model/batch_norm/gamma\" is not part of the model";
    assert!(error.to_string().contains(part), "{error}");
    let mut more = tensors.clone();
    more.insert(
        "tower_1/model/conv2d_0/V".into(),
        tensors["model/conv2d_0/V"].clone(),
    );
    let error = saved_as(&more, |name| Some(name.into())).unwrap_err();
    let part = "\"tower_1/model/conv2d_0/V\" is not part of the model";
    assert!(error.to_string().contains(part), "{error}");
    let towers = tensors
        .iter()
        .map(|(name, t)| (format!("tower_1/{name}"), t.clone()));
    let mut more = tensors.clone();
    more.extend(towers);
    let error = saved_as(&more, |name| Some(name.into())).unwrap_err();
    let part = "several models (\"model/\", \"tower_1/model/\"): save one alone";
    assert!(error.to_string().contains(part), "{error}");
}

#[test]
fn averages_alone_are_the_parameters() {
    let tensors = named(&tiny());
    let expected = saved_as(&tensors, |name| Some(name.into())).unwrap();
    assert_ne!(expected.average, expected.parameters);
    for scope in ["", "tower_0/"] {
        let name = |name: &str| name.ends_with(AVERAGE).then(|| format!("{scope}{name}"));
        let state = saved_as(&tensors, name).unwrap();
        assert_eq!(state.parameters, expected.average);
        assert_eq!(state.average, expected.average);
        assert_eq!(state.step, 0);
        let name = |own: &str| name(own).filter(|_| !own.starts_with("model/dense_3/g"));
        let error = saved_as(&tensors, name).unwrap_err().to_string();
        assert!(error.contains("\"model/dense_3/g\" is missing"), "{error}");
    }
}

fn card() -> hub::Card {
    hub::Card {
        name: "a model".into(),
        averaged: true,
        precision: Precision::Single,
        step: 12,
        images_seen: 192,
        seconds: 5400.0,
        data: "cifar10".into(),
        class_names: vec!["horse".into(), "a|b <i>".into()],
        origin: Some(hub::Origin {
            name: "another|one\n".into(),
            images_seen: 8,
            seconds: 1800.0,
        }),
        measured: Some(hub::Measured {
            bits_per_dim: 2.9213,
            standard_error: Some(0.004),
            images: "10000 images".into(),
        }),
    }
}

#[test]
fn the_hubs_layout_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let elu = ModelConfig {
        nonlinearity: Nonlinearity::Elu,
        nr_classes: 2,
        ..tiny()
    };
    for config in [tiny(), elu] {
        let state = random_state(&config, 1);
        hub::export(folder.path(), &config, &state.average, &card()).unwrap();
        let path = folder.path().join("model.safetensors");
        let again = import(&path, &Unsaid::default()).unwrap();
        assert_eq!(again.config, config);
        assert_eq!(again.parameters, state.average);
        assert_eq!(again.average, state.average);
        // Names are kept where they are as many as the classes.
        let names = match config.nr_classes {
            0 => Vec::new(),
            _ => card().class_names,
        };
        assert_eq!(again.class_names, names);
        assert_eq!(hub::read(&path).unwrap().card.class_names, names);
        // A training that goes on from here begins with everything before it.
        let origin = again.origin.unwrap();
        assert_eq!((&*origin.name, origin.images_seen), ("a model", 200));
        assert_eq!(origin.seconds, 7200.0);
        let text = fs::read_to_string(folder.path().join("README.md")).unwrap();
        assert!(
            text.contains("| bits/dim | 2.9213 ± 0.0040 on 10000 images |"),
            "{text}"
        );
        let origin = r"| begun with | another\|one , after 8 images and 0.5 hours |";
        assert!(text.contains(origin), "{text}");

        // As another program writes it: without our metadata.
        let file = fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let plain = safetensors::serialize(tensors.tensors(), None).unwrap();
        fs::write(&path, plain).unwrap();
        let again = import(&path, &Unsaid::default()).unwrap();
        assert_eq!(again.parameters, state.average);
        assert!(again.class_names.is_empty());
        // A flipped bit is then nobody's to find, but is with the metadata.
        let mut flipped = file.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, flipped).unwrap();
        assert!(import(&path, &Unsaid::default()).is_err());
        fs::write(&path, file).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let said = |unsaid: Unsaid| import(&path, &unsaid).unwrap_err().to_string();
    let size = said(Unsaid {
        size: Some([32, 16]),
        ..Unsaid::default()
    });
    assert!(size.ends_with("is of a model with image size 8x8, not 16x32"));
    let config = folder.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    for (from, to) in [
        ("pixelcnn++", "gpt2"),
        ("\"nr_filters\": 1", "\"nr_filters\": 2"),
        ("\"nr_filters\": 1", "\"nr_filters\": -1"),
        ("\"height\": 8", "\"height\": 0"),
        ("{", "["),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(&config, text.replacen(from, to, 1)).unwrap();
        let error = said(Unsaid::default());
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_card_names_the_classes() {
    let config = ModelConfig {
        nr_classes: 2,
        ..tiny()
    };
    let text = card().text(&config);
    assert!(
        text.contains("\n| classes | 2: horse, a\\|b \\<i\\> |\n"),
        "{text}"
    );
    assert!(card().text(&tiny()).contains("| classes | none: "));
}

#[test]
fn half_precision_comes_back_rounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let card = hub::Card {
        precision: Precision::Half,
        class_names: Vec::new(),
        ..card()
    };
    let config = tiny();
    let mut state = random_state(&config, 1);
    // The largest that there is and what is rounded to it, a denormal, and what vanishes.
    let special = [65504.0, -65519.9, 6e-8, 1e-9];
    state.average[0][..4].copy_from_slice(&special);
    hub::export(folder.path(), &config, &state.average, &card).unwrap();

    let file = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    assert!(
        tensors
            .tensors()
            .iter()
            .all(|(_, t)| t.dtype() == Dtype::F16)
    );
    let again = import(&path, &Unsaid::default()).unwrap();
    assert_eq!(
        again.parameters[0][..4],
        [65504.0, -65504.0, 2.0f32.powi(-24), 0.0]
    );
    for (read, written) in again.parameters.iter().zip(&state.average).skip(1) {
        for (read, written) in read.iter().zip(written) {
            assert!(
                (read - written).abs() <= written.abs() / 2048.0 + 3e-8,
                "{read} {written}"
            );
        }
    }
    let rounded = hub::rounded_to_half(&config, &state.average).unwrap();
    assert_eq!(again.parameters, rounded);
    assert_eq!(again.average, rounded);
    let zeros = Moments::zeros(&Layout::new(&config));
    assert_eq!((again.step, again.moments), (0, Some(zeros)));

    // The file can stand alone, and any damage to it is found.
    let weights = hub::parse(&file, "file").unwrap();
    assert_eq!(weights.card, card);
    assert_eq!((&weights.config, &weights.weights), (&config, &rounded));
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..500 {
        let mut flipped = file.clone();
        flipped[random.random_range(0..file.len())] ^= 1 << random.random_range(0..8);
        // Some bits of the header mean nothing.
        if let Ok(found) = hub::parse(&flipped, "file") {
            assert_eq!(found, weights);
        }
        let cut = &file[..random.random_range(0..file.len())];
        assert!(hub::parse(cut, "file").is_err());
    }

    for value in [65520.0, -1e9, f32::INFINITY, f32::NAN] {
        state.average[2][0] = value;
        let error = hub::export(folder.path(), &config, &state.average, &card).unwrap_err();
        let expected = format!("has the value {value}, which half precision can't hold");
        assert!(error.to_string().contains(&expected), "{error}");
        assert_eq!(fs::read(&path).unwrap(), file);
    }
}

#[test]
fn other_dtypes_are_read_where_they_are_floats() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let config = tiny();
    let state = random_state(&config, 1);
    hub::export(folder.path(), &config, &state.parameters, &card()).unwrap();
    let layout = Layout::new(&config);
    let write = |dtype: Dtype, value: &dyn Fn(f32) -> Vec<u8>| {
        let parameters = layout.parameters.iter().zip(&state.parameters);
        let bytes: Vec<(_, _, Vec<u8>)> = parameters
            .map(|(p, values)| {
                (
                    &p.name,
                    &p.shape,
                    values.iter().flat_map(|&x| value(x)).collect(),
                )
            })
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
        });
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    // The upper half of a float is a bfloat.
    write(Dtype::BF16, &|x| x.to_le_bytes()[2..].to_vec());
    let again = import(&path, &Unsaid::default()).unwrap();
    for (read, written) in again
        .parameters
        .iter()
        .flatten()
        .zip(state.parameters.iter().flatten())
    {
        assert_eq!(read.to_bits(), written.to_bits() & 0xffff_0000);
    }
    write(Dtype::F64, &|x| f64::from(x).to_le_bytes().to_vec());
    let error = import(&path, &Unsaid::default()).unwrap_err().to_string();
    assert!(error.contains("is F64, not F32, F16 or BF16"), "{error}");
}

#[test]
fn npz_has_the_originals_names() {
    let folder = tempfile::tempdir().unwrap();
    let state = random_state(&tiny(), 1);
    npz::export(
        folder.path(),
        "weights.npz",
        &state.config,
        &state.parameters,
    )
    .unwrap();
    let mut file = npyz::npz::NpzArchive::open(folder.path().join("weights.npz")).unwrap();
    let layout = Layout::new(&state.config);
    assert_eq!(file.array_names().count(), layout.parameters.len());
    for (parameter, values) in layout.parameters.iter().zip(&state.parameters) {
        let array = file.by_name(&parameter.name).unwrap().unwrap();
        let shape: Vec<usize> = array.shape().iter().map(|&n| n as usize).collect();
        assert_eq!(shape, parameter.shape);
        assert_eq!(array.into_vec::<f32>().unwrap(), *values);
    }
}

/// Shows `read` a file with every byte changed in turn, and cut off after each: it refuses, or
/// reads the same.
fn damage<T: PartialEq + std::fmt::Debug>(
    file: &[u8],
    checked: bool,
    read: impl Fn(&[u8]) -> Result<T, Fault>,
) {
    let whole = read(file).unwrap();
    let expect = |found: Result<T, Fault>, what: String| match found {
        Err(fault) => assert!(!fault.to_string().contains('\n'), "{what}: {fault}"),
        Ok(found) if checked => assert_eq!(found, whole, "{what}"),
        Ok(_) => {}
    };
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut flipped = file.to_vec();
    for at in 0..file.len() {
        for changed in [file[at] ^ 1 << random.random_range(0..8), random.random()] {
            flipped[at] = changed;
            expect(read(&flipped), format!("byte {at} is {changed}"));
        }
        flipped[at] = file[at];
        expect(read(&file[..at]), format!("cut after {at}"));
    }
}

#[test]
fn damaged_tensorflow_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let state = random_state(&tiny(), 1);
    let mut variables = original::variables(state.optimized().unwrap(), 128, 1).unwrap();
    variables.truncate(30);
    tensorflow::write_v2(folder.path(), "x", variables).unwrap();
    let index = fs::read(folder.path().join("x.index")).unwrap();
    let data = fs::read(folder.path().join("x.data-00000-of-00001")).unwrap();
    damage(&index, true, |index| {
        tensorflow::v2(
            Cursor::new(index),
            |_, _| Ok(Cursor::new(&data)),
            &mut Vec::new(),
        )
    });
    damage(&data, true, |data| {
        tensorflow::v2(
            Cursor::new(&index),
            |_, _| Ok(Cursor::new(data)),
            &mut Vec::new(),
        )
    });
    let file = fs::read(golden(V1)).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..300 {
        let mut flipped = file.clone();
        flipped[random.random_range(0..file.len() - 48)] ^= 1 << random.random_range(0..8);
        let read = |file: &[u8]| tensorflow::v1(Cursor::new(file), &mut Vec::new());
        assert!(read(&flipped).is_err());
        assert!(read(&file[..random.random_range(0..file.len())]).is_err());
    }
}

#[test]
fn damaged_pytorch_files_are_refused() {
    damage(&pth("views.pth"), true, read_pth);
    // The older form has no checksum.
    damage(&pth("views_legacy.pth"), false, read_pth);
}

#[test]
fn damaged_checkpoints_of_pytorch_are_refused() {
    let tensors: Tensors = port_tensors().into_iter().take(40).collect();
    let mut items = others();
    items.retain(|(key, _)| !matches!(key, Py::Text(key) if key == "log"));
    items.push((
        text("model"),
        state_dict(&tensors, |name| format!("module.{name}")),
    ));
    let average = |name: &str| format!("{name}.parametrizations");
    items.push((text("ema"), state_dict(&tensors, average)));
    let checkpoint = Py::Dict(items);
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for file in [save(&checkpoint), save_legacy(&checkpoint)] {
        let expect = |file: &[u8]| {
            if let Err(fault) = read_pth(file).and_then(port::to_original) {
                assert!(!fault.to_string().contains('\n'), "{fault}");
            }
        };
        for _ in 0..2000 {
            let mut flipped = file.clone();
            for _ in 0..random.random_range(1..4) {
                flipped[random.random_range(0..file.len())] = random.random();
            }
            expect(&flipped);
            expect(&file[..random.random_range(0..file.len())]);
        }
    }
}

#[test]
fn damaged_safetensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let state = random_state(&tiny(), 1);
    hub::export(folder.path(), &state.config, &state.parameters, &card()).unwrap();
    let path = folder.path().join("model.safetensors");
    let file = fs::read(&path).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let read = |file: &[u8]| {
        fs::write(&path, file).unwrap();
        match import(&path, &Unsaid::default()) {
            Ok(again) => assert_eq!(again.parameters, state.parameters),
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    };
    for _ in 0..500 {
        let mut flipped = file.clone();
        flipped[random.random_range(0..file.len())] ^= 1 << random.random_range(0..8);
        read(&flipped);
        read(&file[..random.random_range(0..file.len())]);
    }
}

/// Ends TensorFlow's tables.
const TABLE: &[u8] = &0xdb47_7524_8b80_fb57u64.to_le_bytes();

#[test]
fn files_of_other_kinds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for contents in [
        &b""[..],
        b"x",
        b"PK",
        b"PK\x05\x06",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02K\x01.",
        b"\x00\x00\x00\x00\x00\x00\x00\x00{",
        b"\xff\xff\xff\xff\xff\xff\xff\xff{",
        b"just some text that is no file of weights",
        TABLE,
        &[[0; 40].as_slice(), TABLE].concat(),
    ] {
        fs::write(&path, contents).unwrap();
        let error = import(&path, &Unsaid::default()).unwrap_err().to_string();
        assert!(
            error.starts_with('`') || error.starts_with("cannot read"),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
    fs::write(&path, b"\x80\x02}.").unwrap();
    let error = import(&path, &Unsaid::default()).unwrap_err().to_string();
    assert!(error.contains("no PyTorch state dict"), "{error}");
    let error = import(folder.path(), &Unsaid::default()).unwrap_err();
    assert!(error.to_string().contains("it is a folder"), "{error}");
    let missing = folder.path().join("missing");
    let error = import(&missing, &Unsaid::default()).unwrap_err();
    assert!(error.to_string().contains("cannot be read"), "{error}");
}

/// The length of its header, which a safetensors file begins with, may be what zip files and pickles
/// begin with.
#[test]
fn no_length_of_a_header_is_taken_for_pytorchs_marks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let state = random_state(&tiny(), 1);
    let export = |name: String| {
        let card = hub::Card { name, ..card() };
        hub::export(folder.path(), &state.config, &state.average, &card).unwrap();
        let again = import(&path, &Unsaid::default()).unwrap();
        assert_eq!(again.average, state.average);
        fs::read(&path).unwrap()
    };
    let length = |file: &[u8]| u64::from_le_bytes(file[..8].try_into().unwrap());
    let shortest = length(&export(String::new()));
    for (length_wanted, mark) in [
        ((shortest | 0xff) + 0x81, &b"\x80"[..]),
        (0x4b50, &b"PK"[..]),
    ] {
        let name = "x".repeat((length_wanted - shortest) as usize);
        assert!(export(name).starts_with(mark), "{length_wanted}");
    }
}

/// Takes 900 MB of disk and some seconds: `cargo test --release -- --ignored full_size`, and
/// `/usr/bin/time -v pixelcnn import` on what it leaves for memory.
#[test]
#[ignore = "large"]
fn full_size() {
    let config = ModelConfig::default();
    let mut state = random_state(&tiny(), 5);
    let parameters = draw_parameters(&config, 1);
    state.config = config;
    state.average.clone_from(&parameters);
    state.moments = Some(Moments {
        first: parameters.clone(),
        second: parameters.clone(),
    });
    state.parameters = parameters;
    let folder = std::env::temp_dir().join("pixelcnn-full-size");
    let variables = original::variables(state.optimized().unwrap(), 128, 8).unwrap();
    tensorflow::write_v2(&folder, "params_cifar.ckpt", variables).unwrap();
    let start = std::time::Instant::now();
    let again = import(&folder.join("params_cifar.ckpt"), &Unsaid::default()).unwrap();
    println!("{} in {:?}", folder.display(), start.elapsed());
    assert_eq!(again, state);
}

#[test]
fn names_are_all_different() {
    let config = ModelConfig {
        nr_classes: 2,
        ..tiny()
    };
    let state = random_state(&config, 1);
    let variables = original::variables(state.optimized().unwrap(), 8, 2).unwrap();
    let by_name: BTreeMap<_, _> = variables.iter().map(|v| (&v.name, &v.shape)).collect();
    assert_eq!(by_name.len(), variables.len());
    // Labels of two GPUs, then Adam's count.
    assert_eq!(by_name[&"Variable".to_string()], &[4]);
    assert_eq!(by_name[&"Variable_1".to_string()], &[4]);
    assert!(by_name[&"Variable_2".to_string()].is_empty());
}
