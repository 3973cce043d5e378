//! Compression of real images, and a file that must decompress for ever.

use std::io::Cursor;
use std::ops::ControlFlow;

use pixelcnn::ModelConfig;
use pixelcnn::compress::{Archive, CodingModel, CompressError, Picture, compress};
use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::kernels::simd::{self, Level};
use pixelcnn::network::{Batch, Network, draw_parameters, initialise};
use pixelcnn::network::{Layout, ParameterKind};

fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The first images of a data set's test split.
fn pictures(data: &str, n: usize) -> Vec<Picture> {
    let config = DataConfig {
        data: data.into(),
        ..DataConfig::default()
    };
    let data = Dataset::open(&config, Split::Test).unwrap();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let all: Vec<usize> = (0..n.min(data.len())).collect();
    data.read(&all, &mut images, &mut labels).unwrap();
    let images = images.chunks_exact(data.height() * data.width() * data.channels());
    let picture = |(i, (image, label)): (usize, (&[u8], &u32))| Picture {
        name: format!("{i:04}.png"),
        class: *label,
        levels: image.to_vec(),
    };
    images.zip(&labels).enumerate().map(picture).collect()
}

const LEVELS: [Level; 3] = [Level::Avx512, Level::Avx2, Level::Plain];

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");

fn on_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(f)
}

/// Compresses and decompresses in every way; gives the file and the likelihood in bytes.
fn round_trip(
    config: &ModelConfig,
    pictures: &[Picture],
    sizes: &[usize],
    levels: &[Level],
) -> (Vec<u8>, f64) {
    let vectors: Vec<_> = levels.iter().filter(|l| **l <= simd::level()).collect();
    let levels: Vec<u8> = pictures.iter().flat_map(|p| &p.levels).copied().collect();
    let labels: Vec<u32> = pictures.iter().map(|p| p.class).collect();
    let mut parameters = draw_parameters(config, 1);
    let first = pictures.len().min(64);
    let batch = Batch {
        images: &levels[..first * config.dims()],
        labels: &labels[..first],
        ..Batch::default()
    };
    initialise(config, &mut parameters, batch, None, &Device::Cpu).unwrap();
    let network = Network::new(config, &parameters, &Device::Cpu).unwrap();
    let nats = levels.chunks(64 * config.dims()).zip(labels.chunks(64));
    let nats = nats.flat_map(|(images, labels)| {
        let batch = Batch {
            images,
            labels,
            ..Batch::default()
        };
        network.nats_per_image(batch).unwrap()
    });
    let likelihood = nats.sum::<f64>() / 2f64.ln() / 8.0;

    let model = CodingModel::new(config, &parameters).unwrap();
    let ways: Vec<_> = [2, 1]
        .into_iter()
        .flat_map(|threads| sizes.iter().map(move |size| (threads, *size)))
        .zip(vectors.into_iter().cycle())
        .collect();
    let mut files = Vec::new();
    for &((threads, size), level) in &ways {
        let model = model.clone().at(*level);
        let file = on_threads(threads, || compress(&model, pictures, size, &mut go_on));
        files.push(file.unwrap());
    }
    assert!(files.iter().all(|file| *file == files[0]));
    // The other way round, each with other instructions than it was compressed with.
    for &((threads, size), level) in ways.iter().rev() {
        let model = model.clone().at(*level);
        on_threads(threads, || {
            let mut archive = Archive::new(Cursor::new(&files[0])).unwrap();
            let all: Vec<usize> = (0..pictures.len()).collect();
            for which in all.chunks(size) {
                let images = archive.decompress(&model, which, &mut go_on).unwrap();
                for (image, picture) in images.iter().zip(&pictures[which[0]..]) {
                    assert_eq!(image.as_ref(), Ok(&picture.levels), "{}", picture.name);
                }
            }
        });
    }
    (files.swap_remove(0), likelihood)
}

#[test]
fn real_images_come_back_at_the_cost_of_their_likelihood() {
    let config = ModelConfig {
        nr_resnet: 1,
        nr_filters: 8,
        nr_classes: 10,
        ..ModelConfig::default()
    };
    let pictures = pictures(SAMPLE, 10);
    let (file, likelihood) = round_trip(&config, &pictures[..8], &[1, 7, 64], &LEVELS);
    let over = file.len() as f64 - likelihood;
    assert!(
        (0.0..64.0 + 6.0 * 8.0).contains(&over),
        "{over} over {likelihood}"
    );
    let (file, likelihood) = round_trip(&config, &pictures[9..], &[64], &LEVELS);
    let over = file.len() as f64 - likelihood;
    assert!((0.0..64.0).contains(&over), "{over} over {likelihood}");
}

/// 1,000 test images of CIFAR-10, which are downloaded where they are not in the cache:
///
///     cargo test --release -p pixelcnn --test compress -- --ignored --nocapture
#[test]
#[ignore = "takes minutes and needs CIFAR-10"]
fn a_thousand_real_images_come_back() {
    let config = ModelConfig {
        nr_resnet: 2,
        nr_filters: 32,
        ..ModelConfig::default()
    };
    let pictures = pictures("cifar10", 1000);
    // Without vectors it would take hours.
    let fast = match simd::level() {
        Level::Plain => &LEVELS[2..],
        _ => &LEVELS[..2],
    };
    let (file, likelihood) = round_trip(&config, &pictures, &[64, 1], fast);
    let over = file.len() as f64 - likelihood;
    println!(
        "{} bytes, {over:.0} more than the likelihood's {likelihood:.0}",
        file.len()
    );
    assert!((0.0..64.0 + 6.0 * 1000.0).contains(&over));
}

/// A model that is the same on every machine and for ever: no library draws it.
fn fixed_model() -> (ModelConfig, CodingModel) {
    let config = ModelConfig {
        height: 16,
        width: 16,
        nr_resnet: 1,
        nr_filters: 6,
        nr_logistic_mix: 3,
        nr_classes: 10,
        ..ModelConfig::default()
    };
    // SplitMix64, of which the highest 24 bits become a number between -1 and 1 without rounding.
    let mut state = 7u64;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let parameters: Vec<Vec<f32>> = Layout::new(&config)
        .parameters
        .iter()
        .map(|parameter| {
            let values = (0..parameter.len()).map(|_| uniform());
            values
                .map(|u| match parameter.kind {
                    ParameterKind::V | ParameterKind::Hw => u,
                    ParameterKind::G => 1.0 + 0.5 * u,
                    ParameterKind::B => 0.5 * u,
                })
                .collect()
        })
        .collect();
    let model = CodingModel::new(&config, &parameters).unwrap();
    (config, model)
}

/// What is in `data/vector.pxc`: the middles of five images, one of them black and white.
fn fixed_pictures(config: &ModelConfig) -> Vec<Picture> {
    let names = [
        "frog/08.png",
        "frog/09.png",
        "frog/10.png",
        "ship.jpg",
        "black and white.png",
    ];
    let mut pictures = pictures(SAMPLE, names.len());
    for (picture, name) in pictures.iter_mut().zip(names) {
        picture.name = name.into();
        let rows = picture
            .levels
            .chunks_exact(32 * 3)
            .skip(8)
            .take(config.height);
        picture.levels = rows.flat_map(|row| &row[8 * 3..24 * 3]).copied().collect();
    }
    for level in &mut pictures[4].levels {
        *level = 255 * (*level > 127) as u8;
    }
    pictures
}

/// Where this fails, files that others have can no longer be read, or not by those who have an
/// older program: that takes a new version of the format.
#[test]
fn a_file_made_once_is_read_and_made_again() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/vector.pxc");
    let (config, model) = fixed_model();
    let pictures = fixed_pictures(&config);
    if std::env::var_os("PIXELCNN_MAKE_VECTOR").is_some() {
        let file = compress(&model, &pictures, 64, &mut go_on).unwrap();
        std::fs::write(path, file).unwrap();
    }
    let file = std::fs::read(path).unwrap();
    for level in LEVELS {
        if level > simd::level() {
            continue;
        }
        let model = model.clone().at(level);
        let mut archive = Archive::new(Cursor::new(&file)).unwrap();
        let images = archive.decompress(&model, &[0, 1, 2, 3, 4], &mut go_on);
        let images = images.unwrap();
        for ((image, picture), entry) in images.iter().zip(&pictures).zip(archive.entries()) {
            assert_eq!((&entry.name, entry.class), (&picture.name, picture.class));
            assert_eq!(image.as_ref(), Ok(&picture.levels), "{level:?}");
        }
        let again = compress(&model, &pictures, 2, &mut go_on).unwrap();
        // Another deflate may make the index shorter; the streams are all that comes last.
        let streams: u64 = archive.entries().iter().map(|entry| entry.bytes).sum();
        let streams = |file: &[u8]| file[file.len() - streams as usize..].to_vec();
        assert_eq!(streams(&again), streams(&file), "{level:?}");
        let again = Archive::new(Cursor::new(&again)).unwrap();
        assert_eq!(again.model(), archive.model());
        assert_eq!(again.entries().len(), archive.entries().len());
    }
    let mut cut = Archive::new(Cursor::new(&file[..file.len() - 1])).unwrap();
    let images = cut.decompress(&model, &[3, 4], &mut go_on).unwrap();
    assert!(images[0].is_ok() && images[1].is_err());
    let newer = [&b"pxc\x02"[..], &file[4..]].concat();
    let refused = Archive::new(Cursor::new(newer)).unwrap_err();
    assert!(matches!(refused, CompressError::Version(2)));
}
