//! Compression of real images, and files that must decompress for ever.

use std::io::Cursor;
use std::ops::ControlFlow;
#[cfg(feature = "pretrained")]
use std::path::Path;

use pixelcnn::ModelConfig;
use pixelcnn::archive::{Archive, ArchiveError, CodingModel, Found, Item, compress};
use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::kernels::simd::{self, Level};
use pixelcnn::network::{Batch, Network, draw_parameters, initialise};
use pixelcnn::network::{Layout, ParameterKind};

fn go_on(_: f64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A picture's name, class and levels.
struct Picture {
    name: String,
    class: u32,
    levels: Vec<u8>,
}

impl Picture {
    fn item(&self, size: usize) -> Item {
        in_letters(&self.name, self.class, [size, size, 3], &self.levels)
    }
}

/// A file that has each level in letters: any model's is smaller.
fn in_letters(name: &str, class: u32, shape: [usize; 3], levels: &[u8]) -> Item {
    let [height, width, channels] = shape;
    let kind = if channels == 1 { 2 } else { 3 };
    let mut file = format!("P{kind}\n{width} {height}\n255\n");
    levels
        .iter()
        .for_each(|level| file += &format!("{level:3} "));
    Item {
        name: name.into(),
        class,
        bytes: file.into_bytes(),
    }
}

fn levels_of(found: &Found) -> Vec<u8> {
    assert!(found.is_made);
    let image = image::load_from_memory(&found.bytes).unwrap();
    image.as_rgb8().expect("colours").to_vec()
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
fn round_trip(config: &ModelConfig, pictures: &[Picture], levels: &[Level]) -> (Vec<u8>, f64) {
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
    initialise(config, &mut parameters, batch, None, &Device::CPU).unwrap();
    let network = Network::new(config, &parameters, &Device::CPU).unwrap();
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
    let items: Vec<Item> = pictures.iter().map(|picture| picture.item(32)).collect();
    let ways: Vec<_> = [2, 1].into_iter().cycle().zip(vectors).collect();
    let mut files = Vec::new();
    for &(threads, level) in &ways {
        let model = model.clone().at(*level);
        let file = on_threads(threads, || compress(&model, items.clone(), &mut go_on));
        files.push(file.unwrap());
    }
    assert!(files.iter().all(|file| *file == files[0]));
    // The other way round, each with other instructions than it was compressed with.
    for (&(threads, _), level) in ways.iter().zip(ways.iter().rev().map(|(_, level)| **level)) {
        let model = model.clone().at(level);
        on_threads(threads, || {
            let mut archive = Archive::new(Cursor::new(&files[0][..])).unwrap();
            let all: Vec<usize> = (0..pictures.len()).collect();
            let found = archive.read(&model, &all, &mut go_on).unwrap();
            for (found, picture) in found.iter().zip(pictures) {
                let found = found.as_ref().unwrap();
                assert!(levels_of(found) == picture.levels, "{}", picture.name);
            }
        });
    }
    (files.swap_remove(0), likelihood)
}

#[test]
fn real_images_come_back_and_teach() {
    let config = ModelConfig {
        nr_resnet: 1,
        nr_filters: 8,
        nr_classes: 10,
        ..ModelConfig::default()
    };
    let pictures = pictures(SAMPLE, 10);
    let (file, likelihood) = round_trip(&config, &pictures[..8], &LEVELS);
    // A network that has learned nothing is helped by what the images teach.
    let bytes = file.len() as f64;
    assert!(bytes < 0.95 * likelihood, "{bytes} for {likelihood}");
    let (file, likelihood) = round_trip(&config, &pictures[9..], &LEVELS);
    let over = file.len() as f64 - likelihood;
    assert!(over < 128.0, "{over} over {likelihood}");
}

/// 1,000 test images of CIFAR-10, which are downloaded where they are not in the cache:
///
///     cargo test --release -p pixelcnn --test archive -- --ignored --nocapture
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
    let (file, likelihood) = round_trip(&config, &pictures, fast);
    let over = file.len() as f64 - likelihood;
    println!(
        "{} bytes, {over:.0} more than the likelihood's {likelihood:.0}",
        file.len()
    );
    assert!(over < 128.0 + 8.0 * 1000.0);
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

/// What is in `data/vector-2.pxc`: the middles of five images, one of them black and white.
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

/// What is in the vectors of version 2.
fn fixed_items(config: &ModelConfig) -> Vec<Item> {
    let pictures = fixed_pictures(config);
    let mut items: Vec<Item> = pictures.iter().map(|picture| picture.item(16)).collect();
    // One of grey, many tiles and a file beside them.
    let grey: Vec<u8> = (0..70 * 100)
        .map(|i| (i % 100 + i / 100 * 2 + i * i % 7) as u8)
        .collect();
    items.push(in_letters("tall.pgm", 2, [100, 70, 1], &grey));
    items.push(Item {
        name: "notes.txt".into(),
        class: 0,
        bytes: b"of no picture".to_vec(),
    });
    items
}

/// Reads a file of these items with all vector instructions.
fn read_whole(model: &CodingModel, file: &[u8], items: &[Item]) {
    let all: Vec<usize> = (0..items.len()).collect();
    for level in LEVELS.into_iter().filter(|l| *l <= simd::level()) {
        let mut archive = Archive::new(Cursor::new(file)).unwrap();
        let found = archive
            .read(&model.clone().at(level), &all, &mut go_on)
            .unwrap();
        for ((found, item), entry) in found.iter().zip(items).zip(archive.entries()) {
            assert_eq!(entry.name, item.name);
            assert!(found.as_ref().unwrap().is_of(&item.bytes), "{level:?}");
        }
        let made: Vec<bool> = found.iter().map(|f| f.as_ref().unwrap().is_made).collect();
        assert_eq!(made, [true, true, true, true, true, true, false]);
    }
}

/// Where this fails, files that others have can no longer be read, or not by those who have an
/// older program: that takes another mark in the format.
#[test]
fn files_made_once_are_read_and_made_again() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/vector-2-adapted.pxc"
    );
    let (config, model) = fixed_model();
    let mut items = fixed_items(&config);
    // Strips and tiles in colour.
    let levels: Vec<u8> = (0..70 * 100 * 3)
        .map(|i| (i % 210 / 2 + i / 300 * (1 + i % 3) + i * i % 7) as u8)
        .collect();
    items[0] = Item::of_levels("colours.ppm", 1, [100, 70, 3], &levels);
    if std::env::var_os("PIXELCNN_MAKE_VECTOR").is_some() {
        std::fs::write(path, compress(&model, items.clone(), &mut go_on).unwrap()).unwrap();
    }
    let file = std::fs::read(path).unwrap();
    read_whole(&model, &file, &items);
    let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
    for level in LEVELS.into_iter().filter(|l| *l <= simd::level()) {
        let again = compress(&model.clone().at(level), items.clone(), &mut go_on).unwrap();
        // Another deflate may make the head shorter; the streams are the same.
        let mut again = Archive::new(Cursor::new(&again[..])).unwrap();
        assert_eq!(again.reader().model(), archive.reader().model());
        assert_eq!(again.entries(), archive.entries());
    }
    let newer = [&b"pxc\x03"[..], &file[4..]].concat();
    let refused = Archive::new(Cursor::new(newer)).unwrap_err();
    assert!(matches!(refused, ArchiveError::Version(3)));
}

/// Of all models that ever were shipped.
#[cfg(feature = "pretrained")]
const HASHES: [&str; 1] = ["7e4176e6fe68a679895a459e8f36c8e0"];

/// What was compressed by a model that ever was shipped is read for ever, and nobody has to name it.
#[test]
#[cfg(feature = "pretrained")]
fn files_of_shipped_models_need_no_other() {
    let (config, _) = fixed_model();
    let mut pictures = fixed_pictures(&config);
    pictures.iter_mut().for_each(|picture| picture.class = 0);
    let items: Vec<Item> = pictures.iter().map(|picture| picture.item(16)).collect();
    for shipped in pixelcnn::Shipped::ALL {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
        let path = format!("{data}/vector-2-{}.pxc", shipped.name());
        // Those that are there are never made anew.
        if std::env::var_os("PIXELCNN_MAKE_VECTOR").is_some() && !Path::new(&path).exists() {
            let model = shipped.model().unwrap().coder().unwrap();
            std::fs::write(&path, compress(&model, items.clone(), &mut go_on).unwrap()).unwrap();
        }
        let file = std::fs::read(path).unwrap();
        let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
        let hash = archive.reader().model();
        let model = archive.reader().find_model().unwrap().expect("shipped");
        assert_eq!(shipped.model().unwrap().coder().unwrap().hash(), hash);
        assert!(HASHES.contains(&hash.to_string().as_str()), "{hash}");
        let all: Vec<usize> = (0..items.len()).collect();
        let coder = model.coder().unwrap();
        let found = archive.read(&coder, &all, &mut go_on).unwrap();
        for (found, item) in found.iter().zip(&items) {
            let found = found.as_ref().unwrap();
            assert!(found.is_made && found.is_of(&item.bytes), "{}", item.name);
        }
    }
}

/// Those by the network alone, which were written before, are read for ever.
#[test]
fn a_file_that_does_not_adapt_is_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/vector-2.pxc");
    let (config, model) = fixed_model();
    read_whole(&model, &std::fs::read(path).unwrap(), &fixed_items(&config));
}

/// Those of version 1 are read for ever.
#[test]
fn a_file_of_version_1_is_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/vector-1.pxc");
    let (config, model) = fixed_model();
    let pictures = fixed_pictures(&config);
    let file = std::fs::read(path).unwrap();
    for level in LEVELS {
        if level > simd::level() {
            continue;
        }
        let model = model.clone().at(level);
        let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
        let found = archive.read(&model, &[0, 1, 2, 3, 4], &mut go_on).unwrap();
        for ((found, picture), entry) in found.iter().zip(&pictures).zip(archive.entries()) {
            assert_eq!((&entry.name, entry.class), (&picture.name, picture.class));
            assert!(
                levels_of(found.as_ref().unwrap()) == picture.levels,
                "{level:?}"
            );
        }
    }
    let mut cut = Archive::new(Cursor::new(&file[..file.len() - 1])).unwrap();
    let found = cut.read(&model, &[3, 4], &mut go_on).unwrap();
    assert!(found[0].is_ok() && found[1].is_err());
}
