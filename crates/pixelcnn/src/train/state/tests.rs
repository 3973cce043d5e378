use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};

use super::*;
use crate::data::DataConfig;
use crate::train::config::{Optimizer, PolyakStart};
use crate::weights::safetensors::{Checksum, MAX_HEADER};
use ::safetensors::Dtype;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

pub(in crate::train) fn config() -> ModelConfig {
    ModelConfig {
        height: 4,
        width: 4,
        channels: 1,
        nr_resnet: 1,
        nr_filters: 1,
        nr_logistic_mix: 1,
        nr_classes: 0,
        ..ModelConfig::default()
    }
}

/// A state of random bit patterns.
pub(in crate::train) fn state(config: ModelConfig, seed: u64, training: bool) -> TrainState {
    let layout = Layout::new(&config);
    let mut bits = seed;
    let mut arrays = || {
        let mut next = || {
            bits = bits
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            f32::from_bits((bits >> 32) as u32)
        };
        let parameters = layout.parameters.iter();
        parameters
            .map(|p| (0..p.len()).map(|_| next()).collect())
            .collect()
    };
    let (mut parameters, average): (Vec<Vec<f32>>, _) = (arrays(), arrays());
    let moments = training.then(|| Moments {
        first: arrays(),
        second: arrays(),
    });
    // Quiet and signalling NaNs with payloads, denormals, infinities, negative zero.
    let special = [
        0x7fc0_0001,
        0x7f80_0001,
        0xffff_ffff,
        1,
        0x807f_ffff,
        0xff80_0000,
        1 << 31,
    ];
    for (value, bits) in parameters.iter_mut().flatten().zip(special) {
        *value = f32::from_bits(bits);
    }
    TrainState {
        step: seed,
        epoch: 3,
        position: u64::MAX,
        learning_rate: 1e-3 * 0.999995f64.powi(7),
        seed: 0x8000_0000_0000_0001,
        images_seen: 1 << 60,
        seconds: 0.1 + 0.2,
        last_step: seed.is_multiple_of(3).then_some(u64::MAX - seed),
        last_evaluation: seed.is_multiple_of(3).then_some((seed, f64::MIN_POSITIVE)),
        best: seed.is_multiple_of(2).then_some((seed, 3.0 - 1e-15)),
        unrecorded: match seed {
            0 => Unrecorded::default(),
            steps => Unrecorded {
                steps,
                bits_per_dim: 0.1 + 0.2,
                seconds: 1.0 / 3.0,
            },
        },
        run: seed.is_multiple_of(2).then(|| run(config.clone())),
        class_names: match seed.is_multiple_of(2) {
            true => (0..config.nr_classes)
                .map(|n| format!("\"犬\", \\{n}"))
                .collect(),
            false => Vec::new(),
        },
        origin: seed.is_multiple_of(2).then(|| Origin {
            name: "\"犬\", \\\n".into(),
            images_seen: u64::MAX - seed,
            seconds: 0.1 + 0.2,
        }),
        parameters,
        average,
        moments,
        config,
    }
}

/// Settings that no preset has.
fn run(model: ModelConfig) -> RunConfig {
    RunConfig {
        model,
        data: DataConfig {
            data: "photos of \"me\"\n".into(),
            held_out: 0.1 + 0.2,
            ..DataConfig::default()
        },
        train: TrainConfig {
            dropout: 0.1,
            learning_rate_decay: 1.0 - f64::EPSILON,
            cooldown: 1.0 / 3.0,
            optimizer: Optimizer::Muon,
            polyak_start: PolyakStart::Growing,
            ..TrainConfig::default()
        },
    }
}

/// Everything of a state, its numbers as integers, so that NaNs compare.
pub(in crate::train) type Bits = (
    ModelConfig,
    Option<RunConfig>,
    Vec<String>,
    Option<Origin>,
    [u64; 15],
    Vec<Vec<Vec<u32>>>,
);

pub(in crate::train) fn bits(state: &TrainState) -> Bits {
    let mut arrays = vec![&state.parameters, &state.average];
    if let Some(moments) = &state.moments {
        arrays.extend([&moments.first, &moments.second]);
    }
    let array = |array: &Vec<Vec<f32>>| {
        let tensor = |tensor: &Vec<f32>| tensor.iter().map(|x| x.to_bits()).collect();
        array.iter().map(tensor).collect()
    };
    let (evaluated, last) = state.last_evaluation.unwrap_or((u64::MAX, f64::MAX));
    let (best_step, best) = state.best.unwrap_or((u64::MAX, f64::MAX));
    let numbers = [
        state.step,
        state.epoch,
        state.position,
        state.learning_rate.to_bits(),
        state.seed,
        state.images_seen,
        state.seconds.to_bits(),
        state.last_step.unwrap_or_default(),
        evaluated,
        last.to_bits(),
        best_step,
        best.to_bits(),
        state.unrecorded.steps,
        state.unrecorded.bits_per_dim.to_bits(),
        state.unrecorded.seconds.to_bits(),
    ];
    let arrays = arrays.into_iter().map(array).collect();
    let (run, names) = (state.run.clone(), state.class_names.clone());
    let origin = state.origin.clone();
    (state.config.clone(), run, names, origin, numbers, arrays)
}

fn file(state: &TrainState) -> Vec<u8> {
    let mut file = Vec::new();
    let encoded = state.encode(Path::new("")).unwrap();
    encoded.write_to(&mut file).unwrap();
    file
}

fn parse(file: &[u8]) -> Result<TrainState, FileError> {
    let file = SafetensorsFile::read(file, file.len() as u64, Path::new("file"), FORMAT)?;
    TrainState::decode(file)
}

type Contents = (
    BTreeMap<String, String>,
    HashMap<String, (Vec<usize>, Vec<f32>)>,
);

/// A file with a valid checksum whose contents were changed, written by the safetensors crate.
fn forge(state: &TrainState, change: impl FnOnce(&mut Contents)) -> Vec<u8> {
    let file = file(state);
    let read = SafetensorsFile::read(&file[..], file.len() as u64, Path::new(""), FORMAT).unwrap();
    let mut contents = (read.metadata, read.tensors);
    change(&mut contents);
    let (metadata, tensors) = contents;
    let mut checksum = Checksum::new(&metadata);
    let mut bytes = BTreeMap::new();
    for (name, (shape, values)) in tensors {
        let raw: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        bytes.insert(name, (shape, raw));
    }
    for (name, (shape, raw)) in &bytes {
        checksum.tensor(name, Dtype::F32, shape, Sha256::new_with_prefix(raw));
    }
    let mut metadata: HashMap<_, _> = metadata.into_iter().collect();
    metadata.insert("sha256".into(), checksum.finish());
    let views = bytes.iter().map(|(name, (shape, raw))| {
        let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), raw);
        (name, view.unwrap())
    });
    safetensors::serialize(views, Some(metadata)).unwrap()
}

#[test]
fn states_come_back_bit_for_bit() {
    let conditional = ModelConfig {
        channels: 3,
        nr_filters: 3,
        nr_classes: 2,
        nonlinearity: pixelcnn_core::Nonlinearity::Elu,
        ..config()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for (n, config) in [config(), conditional].into_iter().enumerate() {
        for training in [false, true] {
            let state = state(config.clone(), n as u64, training);
            state.write(&path).unwrap();
            let read = TrainState::read(&path).unwrap();
            assert_eq!(bits(&read), bits(&state));
            assert_eq!(fs::read(&path).unwrap(), file(&state));
        }
    }
}

#[test]
fn any_safetensors_reader_opens_them() {
    let state = state(config(), 1, true);
    let file = file(&state);
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let layout = Layout::new(&state.config);
    assert_eq!(read.len(), 4 * layout.parameters.len());
    let Some(moments) = &state.moments else {
        unreachable!()
    };
    for (suffix, array) in [
        ("", &state.parameters),
        ("/ExponentialMovingAverage", &state.average),
        ("/adam_first", &moments.first),
        ("/adam_second", &moments.second),
    ] {
        for (parameter, values) in layout.parameters.iter().zip(array) {
            let tensor = read.tensor(&format!("{}{suffix}", parameter.name)).unwrap();
            assert_eq!(tensor.shape(), parameter.shape);
            let raw: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(tensor.data(), raw);
        }
    }
    let forged = forge(&state, |_| ());
    assert_eq!(bits(&parse(&forged).unwrap()), bits(&state));
}

#[test]
fn truncated_files_are_refused() {
    let file = file(&state(config(), 1, true));
    let lengths = (0..file.len()).step_by(401);
    for length in lengths.chain([1, 7, 8, 9, file.len() - 1]) {
        let error = parse(&file[..length]).unwrap_err();
        assert!(
            matches!(error, FileError::Truncated { .. }),
            "{length}: {error}"
        );
    }
    let longer = [&file[..], b"x"].concat();
    assert!(matches!(parse(&longer), Err(FileError::Altered { .. })));
}

#[test]
fn a_flipped_bit_never_changes_a_number() {
    let state = state(config(), 2, false);
    let file = file(&state);
    let before = bits(&state);
    for at in (0..64).chain((64..file.len()).step_by(23)) {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at / 23 % 8);
        // Some bits of the header mean nothing: the state is the same then.
        if let Ok(read) = parse(&flipped) {
            assert_eq!(bits(&read), before, "byte {at}");
        }
    }
}

proptest! {
    #[test]
    fn garbage_never_panics(mut garbage: Vec<u8>, header in 0u64..200) {
        let _ = parse(&garbage);
        garbage.splice(0..0, header.to_le_bytes());
        let _ = parse(&garbage);
    }
}

#[test]
fn hostile_headers_take_no_memory() {
    let file = |header: &str, length: u64| [&length.to_le_bytes(), header.as_bytes()].concat();
    let meta = r#""__metadata__":{"format":"pixelcnn","version":"1","sha256":""}"#;
    let shape = format!(
        r#"{{{meta},"a":{{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}}}"#
    );
    let overflow = format!(
        r#"{{{meta},"a":{{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}}}"#
    );
    let overlap = format!(
        r#"{{{meta},"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},"b":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#
    );
    let deep = "[".repeat(1 << 16);
    for (header, length) in [
        ("{}", u64::MAX),
        ("{}", u64::MAX - 7),
        ("{}", 1 << 40),
        ("{}", MAX_HEADER),
        ("{}", 2),
        (&shape, shape.len() as u64),
        (&overflow, overflow.len() as u64),
        (&overlap, overlap.len() as u64),
        (&deep, deep.len() as u64),
    ] {
        let error = parse(&file(header, length)).unwrap_err();
        assert!(
            matches!(
                error,
                FileError::Truncated { .. } | FileError::NotACheckpoint { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn a_configuration_that_does_not_fit_is_named() {
    let state = state(config(), 1, true);
    let with_config = |change: fn(&mut ModelConfig)| {
        let mut config = config();
        change(&mut config);
        parse(&forge(&state, |(metadata, _)| {
            metadata.insert("config".into(), json!(config).to_string());
        }))
    };
    let error = with_config(|config| config.nr_filters = 2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`file` does not fit its model configuration: \
         tensor \"model/conv2d_0/V\" has shape [2, 3, 2, 1], not [2, 3, 2, 2]"
    );
    // The largest model there is: nothing of its size is taken.
    let error = with_config(|config| {
        config.nr_filters = 4096;
        config.nr_resnet = 64;
    });
    assert!(matches!(error, Err(FileError::Mismatch { .. })));
    let error = with_config(|config| config.height = 0);
    assert!(matches!(error, Err(FileError::Config { .. })));
    let error = with_config(|config| config.nr_filters = usize::MAX);
    assert!(matches!(error, Err(FileError::Config { .. })));

    let mismatch = |change: fn(&mut Contents)| match parse(&forge(&state, change)) {
        Err(FileError::Mismatch { tensor, reason, .. }) => format!("{tensor} {reason}"),
        other => panic!("{other:?}"),
    };
    let missing = |contents: &mut Contents| {
        contents.1.remove("model/dense_0/b/adam_second").unwrap();
    };
    assert_eq!(mismatch(missing), "model/dense_0/b/adam_second is missing");
    let extra = |contents: &mut Contents| {
        contents.1.insert("extra".into(), (vec![1], vec![0.0]));
    };
    assert_eq!(mismatch(extra), "extra is not part of the model");

    let newer = forge(&state, |(metadata, _)| {
        metadata.insert("version".into(), "2".into());
    });
    let error = parse(&newer).unwrap_err();
    assert!(matches!(error, FileError::Version { version: 2, .. }));
    for key in [
        "step",
        "seconds",
        "config",
        "best_bits_per_dim",
        "unrecorded_seconds",
        "run",
    ] {
        let lacking = forge(&state, |(metadata, _)| {
            metadata.insert("best_step".into(), "1".into());
            metadata.insert(key.into(), "nonsense".into());
        });
        assert!(parse(&lacking).is_err(), "{key}");
    }
    let foreign = forge(&state, |(metadata, _)| {
        metadata.remove("format");
    });
    let error = parse(&foreign).unwrap_err();
    assert!(matches!(error, FileError::NotACheckpoint { .. }));

    let other = ModelConfig {
        nr_filters: 160,
        ..config()
    };
    state.expect_config(&config()).unwrap();
    assert_eq!(
        state.expect_config(&other).unwrap_err().to_string(),
        "nr_filters is 160 in the run and 1 in the model: they must be the same"
    );
}

#[test]
fn states_of_wrong_lengths_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let whole = state(config(), 1, true);
    let mut short = whole.clone();
    short.average[3].pop();
    let mut fewer = whole.clone();
    fewer.parameters.pop();
    let mut more = whole;
    more.parameters.push(vec![]);
    for state in [short, fewer, more] {
        let error = state.write(&path).unwrap_err();
        assert!(matches!(error, FileError::Mismatch { .. }));
    }
    assert!(!path.exists());
}

pub(in crate::train) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<_> = entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A disk with `left` bytes of space.
struct SmallDisk<'a> {
    disk: &'a mut dyn Write,
    left: usize,
}

impl Write for SmallDisk<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let n = self.disk.write(&bytes[..bytes.len().min(self.left)])?;
        self.left -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let (old, new) = (state(config(), 1, true), state(config(), 2, true));
    old.write(&path).unwrap();
    let encoded = new.encode(&path).unwrap();
    for left in (0..file(&new).len()).step_by(5003) {
        let full = atomic::write(&path, |disk| {
            encoded.write_to(&mut SmallDisk { disk, left })
        });
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(names(folder.path()), ["file"]);
    }
    if let Ok(mut full) = File::options().write(true).open("/dev/full") {
        let error = atomic::write(&path, |_| encoded.write_to(&mut full)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
    assert_eq!(bits(&TrainState::read(&path).unwrap()), bits(&old));
}

#[test]
fn earlier_versions_knew_less() {
    let state = state(config(), 2, true);
    let earlier = forge(&state, |(metadata, _)| {
        metadata.retain(|key, _| !key.starts_with("unrecorded") && key != "run");
    });
    let read = parse(&earlier).unwrap();
    assert_eq!((read.unrecorded, &read.run), (Unrecorded::default(), &None));
    // Of the settings it has the model and the seed.
    let mut settings = run(config());
    settings.model.nr_filters = 7;
    let known = read.settings(&settings);
    assert_eq!(known.model, config());
    assert_eq!(known.train.seed, read.seed);
    assert_eq!(known.data, settings.data);
    assert_eq!(state.settings(&settings), run(config()));
}
