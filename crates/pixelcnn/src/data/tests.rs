//! Every format on small made-up files, and every way in which they go wrong.

use std::fs;
use std::io::{Cursor, Write};
use std::ops::Range;

use image::{DynamicImage, ImageEncoder, ImageFormat, Luma, LumaA, Rgb, RgbImage, Rgba};
use proptest::prelude::*;
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::arrays::Room;
use super::*;

fn config(path: impl AsRef<Path>) -> DataConfig {
    DataConfig {
        data: path.as_ref().to_str().unwrap().into(),
        ..Default::default()
    }
}

fn sized(path: impl AsRef<Path>, size: usize) -> DataConfig {
    DataConfig {
        size: Some(size),
        ..config(path)
    }
}

fn open(config: &DataConfig, split: Split) -> Dataset {
    Dataset::open(config, split).unwrap()
}

/// The error of opening it, which is one line.
fn failure(config: &DataConfig, split: Split) -> DataError {
    let error = Dataset::open(config, split).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

macro_rules! assert_fails {
    ($config:expr, $split:expr, $pattern:pat, $($text:expr),+) => {{
        let error = failure(&$config, $split);
        assert!(matches!(error, $pattern), "{error:?}");
        $(assert!(error.to_string().contains($text), "{error}");)+
    }};
}

/// What was told.
#[derive(Default)]
struct Notes(Vec<String>);

impl Notes {
    fn listen(&mut self, told: Opening) -> ControlFlow<()> {
        let Opening::Note(text) = told else {
            panic!("{told:?}");
        };
        assert!(!text.contains('\n'), "{text}");
        self.0.push(text);
        ControlFlow::Continue(())
    }
}

/// A split, and what is told while it is opened.
fn open_told(config: &DataConfig, split: Split) -> (Dataset, String) {
    let mut notes = Notes::default();
    let dataset = Dataset::open_with(config, split, &mut |told| notes.listen(told)).unwrap();
    (dataset, notes.0.join("\n"))
}

fn read(dataset: &Dataset, indices: &[usize]) -> (Vec<Vec<u8>>, Vec<u32>) {
    let (mut images, mut labels) = (vec![1, 2, 3], vec![4]);
    dataset.read(indices, &mut images, &mut labels).unwrap();
    let bytes = dataset.height() * dataset.width() * dataset.channels();
    assert_eq!(images.len(), indices.len() * bytes);
    (images.chunks(bytes).map(<[u8]>::to_vec).collect(), labels)
}

fn read_all(dataset: &Dataset) -> (Vec<Vec<u8>>, Vec<u32>) {
    read(dataset, &(0..dataset.len()).collect::<Vec<_>>())
}

// NumPy files.

fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    npy_with(1, &header, data)
}

/// A file with the header of a version of the format.
fn npy_with(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u32).to_le_bytes();
    let length = match version {
        1 => &length[..2],
        _ => &length,
    };
    [
        &b"\x93NUMPY"[..],
        &[version, 0],
        length,
        header.as_bytes(),
        data,
    ]
    .concat()
}

/// `n` images 4 x 8 x `channels`, all different.
fn pixels(n: usize, channels: usize) -> Vec<u8> {
    (0..n * 32 * channels)
        .map(|i| (i / (32 * channels) * 17 + i % (32 * channels)) as u8)
        .collect()
}

fn images_npy(n: usize) -> Vec<u8> {
    npy("|u1", &format!("({n}, 4, 8, 3)"), &pixels(n, 3))
}

fn labels_npy(labels: &[i64]) -> Vec<u8> {
    let data: Vec<u8> = labels
        .iter()
        .flat_map(|label| label.to_le_bytes())
        .collect();
    npy("<i8", &format!("({},)", labels.len()), &data)
}

fn npz(arrays: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let mut writer = ZipWriter::new(&mut bytes);
    for (name, array) in arrays {
        let options = SimpleFileOptions::default();
        writer.start_file(format!("{name}.npy"), options).unwrap();
        writer.write_all(array).unwrap();
    }
    writer.finish().unwrap();
    bytes.into_inner()
}

/// A `.npz` of one array without compression, as `numpy.savez` writes it.
fn stored_npz(name: &str, array: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(array);
    let name = format!("{name}.npy");
    let mut entry = Vec::new(); // what the local and the central header have in common
    entry.extend([20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0]);
    for n in [
        crc.sum(),
        array.len() as u32,
        array.len() as u32,
        name.len() as u32,
    ] {
        entry.extend(n.to_le_bytes());
    }
    let mut zip = [b"PK\x03\x04", &entry[..], name.as_bytes(), array].concat();
    let directory = [b"PK\x01\x02\x14\x00", &entry[..], &[0; 14], name.as_bytes()].concat();
    let end = [
        [directory.len() as u32, zip.len() as u32]
            .map(u32::to_le_bytes)
            .concat(),
        vec![0, 0],
    ]
    .concat();
    zip.extend(directory);
    zip.extend(b"PK\x05\x06\0\0\0\0\x01\0\x01\0");
    zip.extend(end);
    zip
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A 4 x 4 PNG of one colour.
    fn picture(&self, name: &str, colour: [u8; 3]) -> PathBuf {
        self.write(name, png(RgbImage::from_pixel(4, 4, Rgb(colour))))
    }

    fn config(&self) -> DataConfig {
        config(self.0.path())
    }
}

#[test]
fn the_sample_of_cifar10_is_read_by_index() {
    let config = config(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/cifar10-sample.npz"
    ));
    let train = open(&config, Split::Train);
    assert!(
        train
            .describe()
            .ends_with("cifar10-sample.npz train: 256 images 32x32x3, 10 classes")
    );
    assert_eq!(open(&config, Split::Test).len(), 64);
    let (images, labels) = read_all(&train);
    assert_eq!(labels[..6], [6, 9, 9, 4, 1, 1]);
    assert_eq!(images[0][..6], [59, 62, 63, 43, 46, 45]);
    for class in 0..10 {
        assert!((25..=26).contains(&labels.iter().filter(|&&label| label == class).count()));
    }
    let (some, some_labels) = read(&train, &[200, 3, 200]);
    assert_eq!(
        some,
        [&images[200], &images[3], &images[200]].map(Vec::clone)
    );
    assert_eq!(some_labels, [200, 3, 200].map(|i| labels[i]));
    assert_eq!(read(&train, &[]), (vec![], vec![]));
    let error = train
        .read(&[0, 256], &mut Vec::new(), &mut Vec::new())
        .unwrap_err();
    assert!(matches!(
        error,
        DataError::Index {
            index: 256,
            len: 256
        }
    ));
}

#[test]
fn a_data_set_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Dataset>();
}

#[test]
fn the_configuration_is_checked() {
    assert_eq!(
        toml::from_str::<DataConfig>("").unwrap(),
        DataConfig::default()
    );
    let config = sized("photos", 32);
    assert_eq!(
        toml::from_str::<DataConfig>(&toml::to_string(&config).unwrap()).unwrap(),
        config
    );
    toml::from_str::<DataConfig>("dta = 'cifar10'").unwrap_err();

    for held_out in [-0.1, 1.0, f64::NAN] {
        let config = DataConfig {
            held_out,
            ..config.clone()
        };
        assert_fails!(
            config,
            Split::Train,
            DataError::Config(_),
            "held-out fraction"
        );
    }
    for size in [0, 1 << 40] {
        assert_fails!(
            sized("photos", size),
            Split::Train,
            DataError::Config(_),
            "from 1 to 16384"
        );
    }
    assert_fails!(
        super::tests::config("/nowhere/at all"),
        Split::Train,
        DataError::NotFound { .. },
        "/nowhere/at all"
    );
    let folder = Folder::new();
    let archive = folder.write("images.tar.gz", "");
    assert_fails!(
        super::tests::config(archive),
        Split::Train,
        DataError::Config(_),
        "unpack"
    );
}

#[test]
fn held_out_splits_are_disjoint_complete_and_stable() {
    let keys: Vec<String> = (0..1000).map(|i| format!("image {i}")).collect();
    let test = hold_out(keys.iter(), 0.1, Split::Test);
    let train = hold_out(keys.iter(), 0.1, Split::Train);
    assert_eq!((train.len(), test.len()), (900, 100));
    let mut all = [train, test.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..1000).collect::<Vec<_>>());
    assert_eq!(test[..5], TEST_INDICES);

    // Ten more images move no image into the test set, and few out of it.
    let more = hold_out((0..1010).map(|i| format!("image {i}")), 0.1, Split::Test);
    assert!(test.iter().filter(|i| !more.contains(i)).count() <= 10);

    let count = |n: usize, fraction| hold_out(keys[..n].iter(), fraction, Split::Test).len();
    assert_eq!(
        [
            count(2, 0.01),
            count(2, 0.99),
            count(1, 0.5),
            count(9, 0.0),
            count(0, 0.5)
        ],
        [1, 1, 0, 0, 0]
    );
}

/// Recorded: the splits must not change from one version to the next.
const TEST_INDICES: [usize; 5] = [25, 27, 30, 33, 37];

#[test]
fn npy_arrays_of_colour_and_grey() {
    let folder = Folder::new();
    for (shape, channels) in [
        ("(20, 4, 8, 3)", 3),
        ("(20, 4, 8, 1)", 1),
        ("(20, 4, 8)", 1),
    ] {
        let path = folder.write("a.npy", npy("|u1", shape, &pixels(20, channels)));
        let (train, test) = (
            open(&config(&path), Split::Train),
            open(&config(&path), Split::Test),
        );
        assert_eq!((train.len(), test.len(), train.nr_classes()), (18, 2, 0));
        assert_eq!(
            [test.height(), test.width(), test.channels()],
            [4, 8, channels]
        );
        let (train_images, labels) = read_all(&train);
        assert!(labels.is_empty());
        let mut all = [train_images, read_all(&test).0].concat();
        all.sort();
        let mut expected: Vec<_> = pixels(20, channels)
            .chunks(32 * channels)
            .map(<[u8]>::to_vec)
            .collect();
        expected.sort();
        assert_eq!(all, expected);
    }
    // Version 2 of the format has a longer length.
    let mut long = images_npy(2);
    long[6] = 2;
    long.splice(10..10, [0, 0]);
    assert_eq!(
        open(&config(folder.write("b.npy", long)), Split::Train).len(),
        1
    );
}

/// All images of an array, in its order.
fn all_images(path: &Path) -> (Dataset, Vec<Vec<u8>>) {
    let config = DataConfig {
        held_out: 0.0,
        ..config(path)
    };
    let dataset = open(&config, Split::Train);
    let images = read_all(&dataset).0;
    (dataset, images)
}

#[test]
fn npy_headers_of_any_python() {
    let folder = Folder::new();
    let long_one = format!(
        "{{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 8, 3), }}{}\n",
        " ".repeat(3000)
    );
    for header in [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 4L, 8L, 3L), }   \n",
        "{'shape': (2L, 4L, 8L, 3L), 'fortran_order': False, 'descr': '|u1'}",
        "{u'descr': u'|u1', u'fortran_order': False, u'shape': (2L,4L,8L,3L)}\n",
        r#"{"descr": "|u1", "fortran_order": False, "shape": (2, 4L, 8, 3)}"#,
        "{b'descr': b'|u1', b'shape' : ( 2, 4, 8, 3, ), b'fortran_order': False}",
        "{'descr':'<u1','fortran_order':False,'shape':(2,4,8,3)}\t \n",
        &long_one,
    ] {
        for version in [1, 2, 3] {
            let path = folder.write("a.npy", npy_with(version, header, &pixels(2, 3)));
            let (dataset, images) = all_images(&path);
            assert!(dataset.describe().contains("2 images 8x4x3"), "{header}");
            assert_eq!(images.concat(), pixels(2, 3), "{header}");
        }
    }
    let y = npy_with(
        1,
        "{'descr': '<i8', 'fortran_order': False, 'shape': (3L,), }\n",
        &[4i64, 0, 2].map(i64::to_le_bytes).concat(),
    );
    let arrays = [
        ("trainx", images_npy(3)),
        ("trainy", y.clone()),
        ("testx", images_npy(3)),
        ("testy", y),
    ];
    let path = folder.write("a.npz", npz(&arrays));
    assert_eq!(read_all(&open(&config(&path), Split::Test)).1, [4, 0, 2]);

    for shape in [
        "(2LL, 4, 8, 3)",
        "(2l, 4, 8, 3)",
        "(L, 4, 8, 3)",
        "(2.0, 4, 8, 3)",
        "2L",
    ] {
        let path = folder.write("a.npy", npy("|u1", shape, &pixels(2, 3)));
        assert_fails!(
            config(&path),
            Split::Train,
            DataError::Array { .. },
            "damaged"
        );
    }
}

#[test]
fn npy_arrays_of_single_images_and_of_channels_first() {
    let folder = Folder::new();
    for (shape, channels) in [("(4, 8, 3)", 3), ("(4, 8, 1)", 1)] {
        let path = folder.write("a.npy", npy("|u1", shape, &pixels(1, channels)));
        let (dataset, images) = all_images(&path);
        assert_eq!(
            [
                dataset.len(),
                dataset.height(),
                dataset.width(),
                dataset.channels()
            ],
            [1, 4, 8, channels]
        );
        assert_eq!(images, [pixels(1, channels)]);
    }
    // Value: the image, the channel and the column.
    let value = |n: usize, c: usize, x: usize| (100 * n + 10 * c + x) as u8;
    let planes: Vec<u8> = (0..2 * 3 * 4 * 8)
        .map(|i| value(i / 96, i / 32 % 3, i % 8))
        .collect();
    let pixels: Vec<u8> = (0..2 * 4 * 8 * 3)
        .map(|i| value(i / 96, i % 3, i / 3 % 8))
        .collect();
    let path = folder.write("a.npy", npy("|u1", "(2, 3, 4, 8)", &planes));
    let (dataset, images) = all_images(&path);
    assert_eq!(
        [dataset.height(), dataset.width(), dataset.channels()],
        [4, 8, 3]
    );
    assert_eq!(images.concat(), pixels);
    let path = folder.write("a.npz", npz(&[("x", npy("|u1", "(2, 3, 4, 8)", &planes))]));
    assert_eq!(all_images(&path).1.concat(), pixels);
    let path = folder.write("a.npy", npy("|u1", "(6, 1, 4, 8)", &planes));
    let (dataset, images) = all_images(&path);
    assert_eq!((dataset.len(), dataset.channels()), (6, 1));
    assert_eq!(images.concat(), planes);
}

#[test]
fn npy_arrays_that_are_not_images_are_refused() {
    let folder = Folder::new();
    let fails = |bytes: Vec<u8>, text: &str| {
        let path = folder.write("a.npy", bytes);
        assert_fails!(
            config(&path),
            Split::Train,
            DataError::Array { .. },
            text,
            "a.npy"
        );
    };
    fails(images_npy(3)[..200].to_vec(), "cut off");
    fails([images_npy(3), vec![0]].concat(), "damaged");
    fails(
        npy("<f4", "(1, 4, 4, 3)", &[0; 192]),
        "holds float32 values, not 8-bit ones: scale them to 0..255",
    );
    fails(npy(">i8", "(1, 4, 4, 3)", &[0; 384]), "holds int64 values");
    fails(
        npy("|O", "(3,)", b"\x80\x03]q\x00."),
        "pickled Python objects",
    );
    fails(
        b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c".to_vec(),
        "a Python pickle",
    );
    fails(
        npy_with(
            1,
            "{'descr': [('r', '|u1')], 'fortran_order': False, 'shape': (3, 4, 4)}",
            &[0; 48],
        ),
        "holds records",
    );
    fails(npy("|b1", "(1, 4, 4, 3)", &[0; 48]), "astype(numpy.uint8)");
    fails(
        npy("|u1", "(1, 2, 4, 8)", &[0; 64]),
        "[1, 2, 4, 8]: images are [N, H, W, C]",
    );
    fails(npy("|u1", "(1, 4, 4, 4)", &[0; 64]), "x[..., :3]");
    fails(npy("|u1", "(4, 4, 3, 2)", &[0; 96]), "numpy.transpose");
    fails(npy("|u1", "(2, 3072)", &[0; 6144]), "numpy.reshape");
    fails(npy("|u1", "(1, 12288)", &[0; 12288]), "imagenet64");
    fails(npy("|u1", "()", &[0]), "shape []");
    fails(npy("|u1", "(48,)", &[0; 48]), "[48]");
    fails(npy("|u1", "(1, 0, 4, 3)", &[]), "[1, 0, 4, 3]");
    fails(npy("|u1", "(1000000000000, 4, 4, 3)", &[0; 48]), "cut off");
    fails(
        npy("|u1", "(9223372036854775808, 4, 4, 3)", &[0; 48]),
        "impossible",
    );
    fails(
        npy("|u1", "(99999999999999999999, 4, 4, 3)", &[0; 48]),
        "damaged",
    );
    fails(npy("|u1", "(-1, 4, 4, 3)", &[0; 48]), "damaged");
    fails(
        npy(
            "|u1",
            &format!("{}1{}", "(".repeat(5000), ")".repeat(5000)),
            &[],
        ),
        "damaged",
    );
    fails(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{".to_vec(), "4294967295");
    fails(b"PK\x03\x04 not at all".to_vec(), "not a NumPy array");
    fails(vec![], "not a NumPy array");
    let fortran =
        String::from_utf8_lossy(&npy("|u1", "(1, 4, 4, 3)", &[])[10..]).replace("False", "True ");
    let fortran = [
        &b"\x93NUMPY\x01\x00"[..],
        &[fortran.len() as u8, 0],
        fortran.as_bytes(),
        &[0; 48],
    ]
    .concat();
    fails(fortran, "ascontiguousarray");

    let path = folder.write("a.npy", npy("|u1", "(3, 20000, 4)", &[0; 240_000]));
    assert_fails!(
        config(&path),
        Split::Train,
        DataError::Sides { .. },
        "4x20000",
        "choose a size"
    );
    let path = folder.write("a.npy", npy("|u1", "(3, 4, 4)", &[0; 48]));
    assert_fails!(
        sized(&path, 8),
        Split::Train,
        DataError::Config(_),
        "size 8"
    );
    assert_eq!(open(&sized(&path, 4), Split::Train).len(), 2);
    let path = folder.write("a.npy", npy("|u1", "(0, 4, 4)", &[]));
    assert_fails!(
        config(&path),
        Split::Train,
        DataError::Empty { .. },
        "no images"
    );
    let path = folder.write("a.npy", npy("|u1", "(1, 4, 4)", &[0; 16]));
    assert_fails!(
        config(&path),
        Split::Test,
        DataError::Empty { .. },
        "held-out"
    );
}

#[test]
fn npz_arrays_with_and_without_splits_and_labels() {
    let folder = Folder::new();
    let y: Vec<i64> = (0..20).collect();
    let path = folder.write(
        "a.npz",
        npz(&[("x", images_npy(20)), ("y", labels_npy(&y))]),
    );
    for split in [Split::Train, Split::Test] {
        let dataset = open(&config(&path), split);
        assert_eq!(dataset.nr_classes(), 20);
        let (images, labels) = read_all(&dataset);
        assert_eq!(labels.len(), if split == Split::Train { 18 } else { 2 });
        for (image, label) in images.iter().zip(labels) {
            assert_eq!(
                image[0] as u32,
                label * 17 % 256,
                "the label is that of the image"
            );
        }
    }
    for [trainx, trainy, testx, testy] in [
        ["trainx", "trainy", "testx", "testy"],
        ["x_train", "y_train", "x_test", "y_test"],
        ["X_train", "Y_train", "X_test", "Y_test"],
        ["train_images", "train_labels", "test_images", "test_labels"],
        [
            "training_images",
            "training_labels",
            "testing_images",
            "testing_labels",
        ],
        ["images_train", "labels_train", "images_val", "labels_val"],
        ["x", "y", "x_test", "y_test"],
        ["train_data", "train_targets", "valid_data", "valid_targets"],
        ["Train-X", "Train-Y", "Dev-X", "Dev-Y"],
        ["train", "train_label", "test", "test_label"],
    ] {
        let small = npy("|u1", "(3, 1)", &[0, 2, 1]);
        let arrays = [
            (trainx, images_npy(3)),
            (trainy, small),
            (testx, images_npy(2)),
            (testy, labels_npy(&[6, 0])),
        ];
        let path = folder.write("a.npz", npz(&arrays));
        let (train, test) = (
            open(&config(&path), Split::Train),
            open(&config(&path), Split::Test),
        );
        assert_eq!((train.nr_classes(), test.nr_classes()), (7, 7));
        assert_eq!(read_all(&train).1, [0, 2, 1]);
        assert_eq!(read_all(&test).1, [6, 0]);
        assert_eq!(read_all(&train).0.concat(), pixels(3, 3));
    }
    let path = folder.write(
        "a.npz",
        npz(&[("trainx", images_npy(3)), ("testx", images_npy(2))]),
    );
    assert_eq!(open(&config(&path), Split::Test).nr_classes(), 0);
    let big_endian = npy(">i2", "(3,)", &[0, 0, 1, 0, 0, 1]);
    let path = folder.write(
        "a.npz",
        npz(&[
            ("trainx", images_npy(3)),
            ("trainy", big_endian),
            ("testx", images_npy(1)),
            ("testy", labels_npy(&[0])),
        ]),
    );
    assert_eq!(read_all(&open(&config(&path), Split::Train)).1, [0, 256, 1]);
}

#[test]
fn npz_arrays_under_the_names_that_people_give() {
    let folder = Folder::new();
    let y = || labels_npy(&[2, 0, 1]);
    for (x, labels) in [
        ("images", "labels"),
        ("x", "y"),
        ("X", "y"),
        ("data", "labels"),
        ("imgs", "target"),
        ("data", "targets"),
        ("arr_0", "arr_1"),
        ("arr_1", "arr_0"),
        ("train_images", "train_labels"),
        ("x_test", "y_test"),
        ("faces", "labels"),
    ] {
        let path = folder.write("a.npz", npz(&[(x, images_npy(3)), (labels, y())]));
        let all = DataConfig {
            held_out: 0.0,
            ..config(&path)
        };
        let (dataset, told) = open_told(&all, Split::Train);
        assert_eq!(told, "");
        assert_eq!((dataset.len(), dataset.nr_classes()), (3, 3), "{x}");
        let (images, labels) = read_all(&dataset);
        assert_eq!(
            (images.concat(), labels),
            (pixels(3, 3), vec![2, 0, 1]),
            "{x}"
        );
        assert_fails!(all, Split::Test, DataError::Empty { .. }, "held-out");
    }
    // The one that can be images among statistics of them.
    let mu = || npy("<f8", "(2,)", &[0; 16]);
    for name in ["arr_0", "VIRTUAL faces", "images"] {
        let path = folder.write("a.npz", npz(&[("mu", mu()), (name, images_npy(3))]));
        let (dataset, told) = open_told(&config(&path), Split::Train);
        assert_eq!((dataset.len(), dataset.nr_classes()), (2, 0));
        assert_eq!(told, format!("{}: not used: mu", path.display()));
    }
    // Whatever the name, what is told is one line.
    let path = folder.write("a.npz", npz(&[("a\nb", images_npy(3)), ("c\nd", mu())]));
    assert_eq!(open_told(&config(&path), Split::Train).0.len(), 2);
    let path = folder.write("a.npz", npz(&[("a\nb", images_npy(3)[..200].to_vec())]));
    assert_fails!(
        config(&path),
        Split::Train,
        DataError::Array { .. },
        "a b: "
    );
    // A mask or a table does not hide the images.
    let table = || npy("<f8", "(3, 2)", &[0; 48]);
    let mask = || npy("|b1", "(3,)", &[0, 0, 1]);
    let arrays = [
        ("data", table()),
        ("images", images_npy(3)),
        ("test", mask()),
        ("y", y()),
    ];
    let (dataset, told) = open_told(&config(folder.write("a.npz", npz(&arrays))), Split::Train);
    assert_eq!((dataset.len(), dataset.nr_classes()), (2, 3));
    assert!(told.ends_with("a.npz: not used: data, test"), "{told}");

    // With three splits, as medical ones come, that for choosing settings is not used.
    let names = ["train", "val", "test"];
    let arrays: Vec<_> = (2..)
        .zip(names)
        .flat_map(|(n, part)| {
            let labels = npy(
                "|u1",
                &format!("({n}, 1)"),
                &(0..n as u8).collect::<Vec<_>>(),
            );
            [
                (format!("{part}_images"), images_npy(n)),
                (format!("{part}_labels"), labels),
            ]
        })
        .collect();
    let arrays: Vec<_> = arrays
        .iter()
        .map(|(name, array)| (name.as_str(), array.clone()))
        .collect();
    let path = folder.write("a.npz", npz(&arrays));
    let (train, told) = open_told(&config(&path), Split::Train);
    assert!(
        told.ends_with("a.npz: not used: val_images, val_labels"),
        "{told}"
    );
    let test = open(&config(&path), Split::Test);
    assert_eq!((train.len(), test.len()), (2, 4));
    assert_eq!([train.nr_classes(), test.nr_classes()], [4, 4]);
    assert_eq!(read_all(&test).1, [0, 1, 2, 3]);
}

#[test]
fn npz_labels_in_other_forms() {
    let folder = Folder::new();
    let labels = |y: Vec<u8>| {
        let path = folder.write("a.npz", npz(&[("x", images_npy(3)), ("y", y)]));
        let all = DataConfig {
            held_out: 0.0,
            ..config(&path)
        };
        let (dataset, told) = open_told(&all, Split::Train);
        let labels = read_all(&dataset).1;
        assert_eq!(dataset.nr_classes() == 0, labels.is_empty());
        (labels, told)
    };
    let floats = |numbers: &[f32]| -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|number| number.to_be_bytes())
            .collect()
    };
    let doubles = |numbers: &[f64]| -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect()
    };
    let one_hot = [0, 1, 0, 0, 0, 1, 1, 0, 0u8];
    for y in [
        npy("|u1", "(3, 1)", &[1, 2, 0]),
        npy("<u4", "(3L,)", &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        npy(">i8", "(3,)", &[1i64, 2, 0].map(i64::to_be_bytes).concat()),
        npy("|u1", "(3, 3)", &one_hot),
        npy("|b1", "(3, 3)", &one_hot),
        npy("<f8", "(3, 3)", &doubles(&one_hot.map(f64::from))),
        npy(">f4", "(3, 3)", &floats(&one_hot.map(f32::from))),
        npy(">f4", "(3,)", &floats(&[1., 2., 0.])),
        npy("<f8", "(3, 1)", &doubles(&[1., 2., 0.])),
    ] {
        assert_eq!(labels(y), (vec![1, 2, 0], String::new()));
    }
    assert_eq!(labels(npy("|b1", "(3,)", &[0, 1, 1])).0, [0, 1, 1]);

    // What is no class is said and left out.
    for (y, why) in [
        (npy("|u1", "(3, 3)", &[1; 9]), "y: not one-hot"),
        (npy("|u1", "(3, 3)", &[0; 9]), "y: not one-hot"),
        (
            npy("|u1", "(3, 3)", &[2, 0, 0, 1, 0, 0, 0, 1, 0]),
            "y: not one-hot",
        ),
        (npy("<f4", "(3,)", &[9; 12]), "not classes"),
        (
            npy("<f8", "(3,)", &doubles(&[0., f64::NAN, 1.])),
            "not classes",
        ),
        (npy("<f8", "(3,)", &doubles(&[0., -1., 1.])), "not classes"),
        (
            npy("<f8", "(3,)", &doubles(&[0., f64::INFINITY, 1.])),
            "not classes",
        ),
        (labels_npy(&[0, -1, 2]), "not classes"),
        (npy("|i1", "(3,)", &[0, 255, 1]), "not classes"),
        (labels_npy(&[0, 1, 65536]), "from 0 to at most 65535"),
        (
            npy("<U5", "(3,)", &[0; 60]),
            "y: holds text values, not numbers",
        ),
        (npy("|O", "(3,)", &[0; 9]), "y: holds object values"),
        (npy("|u1", "(3, 2, 2)", &[0; 12]), "y: has shape [3, 2, 2]"),
    ] {
        let (labels, told) = labels(y);
        assert!(labels.is_empty());
        assert!(
            told.contains(why) && told.ends_with("read without labels"),
            "{told}"
        );
    }
    let one_labelled = [
        ("trainx", images_npy(3)),
        ("trainy", labels_npy(&[1, 2, 0])),
        ("testx", images_npy(3)),
    ];
    let path = folder.write("a.npz", npz(&one_labelled));
    for split in [Split::Train, Split::Test] {
        let (dataset, told) = open_told(&config(&path), split);
        assert_eq!(dataset.nr_classes(), 0);
        assert!(
            told.contains("a.npz: testx has no labels: read without labels"),
            "{told}"
        );
    }
}

#[test]
fn npz_arrays_that_do_not_fit_in_memory_stay_in_files() {
    let folder = Folder::new();
    let no_room = || Room {
        memory: 100,
        spill: folder.path("cache"),
    };
    let packed = folder.write("packed.npz", npz(&[("x", images_npy(20))]));
    let stored = folder.write("stored.npz", stored_npz("x", &images_npy(20)));
    for path in [&packed, &stored] {
        let in_memory = read_all(&open(&config(path), Split::Train));
        let in_file =
            super::arrays::open_npz(path, 0.1, Split::Train, no_room(), &mut unheard).unwrap();
        assert_eq!(read_all(&in_file), in_memory);
    }
    // The stored one is read where it lies, the other one from a file without a name.
    assert_eq!(fs::read_dir(folder.path("cache")).unwrap().count(), 0);
    let in_place =
        super::arrays::open_npz(&stored, 0.1, Split::Train, no_room(), &mut unheard).unwrap();
    let mut bytes = fs::read(&stored).unwrap();
    bytes.truncate(300);
    fs::write(&stored, bytes).unwrap();
    let error = in_place
        .read(&[17], &mut Vec::new(), &mut Vec::new())
        .unwrap_err();
    assert!(
        matches!(error, DataError::Io { ref path, .. } if *path == stored),
        "{error}"
    );

    let mut wrong = stored_npz("x", &images_npy(20));
    wrong[500] ^= 1;
    let path = folder.write("wrong.npz", wrong);
    assert_fails!(
        config(&path),
        Split::Train,
        DataError::Array { .. },
        "checksum"
    );
}

#[test]
fn npz_files_that_do_not_hold_images_are_refused() {
    let folder = Folder::new();
    let fails = |bytes: Vec<u8>, text: &str| {
        let path = folder.write("a.npz", bytes);
        assert_fails!(
            config(&path),
            Split::Test,
            DataError::Array { .. },
            text,
            "a.npz"
        );
    };
    let whole = npz(&[("x", images_npy(20))]);
    fails(whole[..whole.len() / 2].to_vec(), "cut off");
    fails(vec![], "cut off");
    fails(
        npz(&[("b", images_npy(2)), ("a", images_npy(2))]),
        "holds a (uint8 [2, 4, 8, 3]), b (uint8 [2, 4, 8, 3]): name the images x_train and x_test",
    );
    fails(
        npz(&[("index", labels_npy(&[1])), ("label", labels_npy(&[2]))]),
        "holds index (int64 [1]), label (int64 [1]): no images, which are uint8",
    );
    fails(
        npz(&[("arr_0", npy("<f4", "(1, 4, 4)", &[0; 64]))]),
        "arr_0: holds float32 values",
    );
    fails(
        npz(&[
            ("x_train", images_npy(2)),
            ("x_test", npy("<f4", "(1, 4, 8, 3)", &[0; 384])),
        ]),
        "x_test: holds float32 values",
    );
    fails(
        npz(&[("images", npy("|O", "(2,)", b"\x80\x03]q\x00."))]),
        "images: holds pickled Python objects",
    );
    fails(npz(&[]), "no arrays");
    fails(
        npz(&[("x", npy("<f8", "(2, 4, 4)", &[0; 256]))]),
        "x: holds float64 values",
    );
    fails(
        npz(&[("x", npy("|u1", "(2000000, 4, 4)", &[0; 32]))]),
        "cut off",
    );
    fails(
        npz(&[("x", npy("|u1", "(1000000000000, 4, 4)", &[0; 32]))]),
        "cut off",
    );
    fails(
        stored_npz("x", &npy("|u1", "(3, 4, 4)", &[0; 32])),
        "cut off",
    );
    let labelled = |y: Vec<u8>| npz(&[("x", images_npy(3)), ("y", y)]);
    fails(
        labelled(labels_npy(&[1, 2])),
        "3 images in x, 2 labels in y",
    );
    fails(labelled(labels_npy(&[])), "0 labels in y");
    fails(labelled(labels_npy(&[1, 2, 0])[..90].to_vec()), "cut off");
}

// Pictures.

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    encode(image, ImageFormat::Png)
}

#[test]
fn sub_folders_are_classes() {
    let folder = Folder::new();
    for i in 0..20 {
        folder.picture(&format!("dog/{i}.PNG"), [1, i, 0]);
        folder.picture(&format!("cat/deeper/{i}.png"), [0, i, 0]);
    }
    folder.write("dog/notes.txt", "not a picture");
    folder.write(".hidden/a.png", "not one either");
    let (train, test) = (
        open(&folder.config(), Split::Train),
        open(&folder.config(), Split::Test),
    );
    assert_eq!((train.len(), test.len()), (36, 4));
    let mut colours = Vec::new();
    for dataset in [train, test] {
        assert_eq!(dataset.class_names(), ["cat", "dog"]);
        assert_eq!(
            [
                dataset.nr_classes(),
                dataset.height(),
                dataset.width(),
                dataset.channels()
            ],
            [2, 4, 4, 3]
        );
        let (images, labels) = read_all(&dataset);
        // A second time they come from memory.
        assert_eq!(read_all(&dataset), (images.clone(), labels.clone()));
        for (image, label) in images.iter().zip(labels) {
            assert_eq!(image[0] as u32, label);
            colours.push([image[0], image[1]]);
        }
    }
    colours.sort_unstable();
    assert_eq!(
        colours,
        (0..40).map(|i| [i / 20, i % 20]).collect::<Vec<_>>()
    );
}

#[test]
fn folders_of_splits() {
    let folder = Folder::new();
    let colours = |split| -> Vec<u8> {
        read_all(&open(&folder.config(), split))
            .0
            .iter()
            .map(|image| image[0])
            .collect()
    };
    for i in 0..10 {
        folder.picture(&format!("train/{i}.png"), [i, 0, 0]);
    }
    assert_eq!(
        (colours(Split::Train).len(), colours(Split::Test).len()),
        (9, 1)
    );
    folder.picture("valid/a.png", [100, 0, 0]);
    folder.picture("unrelated/a.png", [101, 0, 0]);
    assert_eq!(
        (colours(Split::Train), colours(Split::Test)),
        ((0..10).collect(), vec![100])
    );
    folder.picture("test/b.png", [102, 0, 0]);
    assert_eq!(colours(Split::Test), [102], "test goes before valid");

    let folder = Folder::new();
    for name in [
        "train/a/1.png",
        "train/b/1.png",
        "train/c/1.png",
        "test/b/1.png",
        "test/c/1.png",
    ] {
        folder.picture(name, [0; 3]);
    }
    assert_eq!(
        read_all(&open(&folder.config(), Split::Test)).1,
        [1, 2],
        "numbered as in train/"
    );
    folder.picture("test/d/1.png", [0; 3]);
    // Where the splits don't agree there are no labels: only who needs them minds.
    for split in [Split::Train, Split::Test] {
        let dataset = open(&folder.config(), split);
        assert_eq!((dataset.nr_classes(), read_all(&dataset).1.len()), (0, 0));
        let problem = dataset.no_labels().unwrap();
        assert!(problem.contains("class d of test/ is not in"), "{problem}");
    }
}

/// A split's colours and labels, and what is told of opening it.
fn opened(config: &DataConfig, split: Split) -> (Vec<u8>, Vec<u32>, String) {
    let (dataset, notes) = open_told(config, split);
    let (images, labels) = read_all(&dataset);
    let colours = images.iter().map(|image| image[0]).collect();
    (colours, labels, notes)
}

#[test]
fn splits_are_known_by_their_usual_names() {
    // (names, training, test, what is told)
    for (names, train, test, told) in [
        (
            &["Train/cat/1", "Train/dog/1", "Test/cat/1", "Test/dog/1"][..],
            &[0, 1][..],
            &[2, 3][..],
            "training images in Train/ (2), test images in Test/ (2)",
        ),
        (
            &["TRAINING/1", "Validation/1", "Validation/2", "test.png/1"],
            &[0],
            &[1, 2],
            "training images in TRAINING/ (1), test images in Validation/ (2); unused: test.png/ (1)",
        ),
        (
            &["x/train/1", "x/dev/1", "x/val/1", "x/val/2", "x/1"],
            &[0],
            &[2, 3],
            "training images in train/ (1), test images in val/ (2); unused: dev/ (1), 1 beside them",
        ),
        // The splits in each class.
        (
            &["cat/train/1", "cat/test/1", "dog/train/1", "dog/test/1"],
            &[0, 2],
            &[1, 3],
            "training images in */train/ (2), test images in */test/ (2)",
        ),
    ] {
        let folder = Folder::new();
        for (i, name) in names.iter().enumerate() {
            folder.picture(&format!("{name}.png"), [i as u8, 0, 0]);
        }
        for (split, expected) in [(Split::Train, train), (Split::Test, test)] {
            let (mut colours, labels, notes) = opened(&folder.config(), split);
            colours.sort_unstable();
            assert_eq!(colours, expected, "{names:?}");
            assert!(notes.contains(told), "{notes}");
            let classes = if names[0].contains("cat") { 2 } else { 0 };
            assert_eq!(labels.len(), classes, "{names:?}");
        }
    }
    // As Tiny ImageNet has it: classes for training alone.
    let folder = Folder::new();
    for name in [
        "train/n01/images/1",
        "train/n02/images/1",
        "val/images/1",
        "test/images/1",
    ] {
        folder.picture(&format!("{name}.png"), [0; 3]);
    }
    folder.write("val/val_annotations.txt", "1.png n01");
    let test = open(&folder.config(), Split::Test);
    assert_eq!((test.len(), test.nr_classes()), (1, 0));
    assert!(test.no_labels().unwrap().contains("class images of test/"));
    let (_, _, notes) = opened(&folder.config(), Split::Train);
    assert!(notes.contains("unused: val/ (1)"), "{notes}");
    assert!(notes.contains("1 file is left out: 1 .txt"), "{notes}");

    // Never is a folder of test images trained on.
    let folder = Folder::new();
    folder.picture("Test/1.png", [1; 3]);
    assert_fails!(
        folder.config(),
        Split::Train,
        DataError::Empty { .. },
        "Test/ is for testing"
    );
    folder.picture("cat/1.png", [2; 3]);
    failure(&folder.config(), Split::Train);
    assert_eq!(opened(&folder.config(), Split::Test).0, [1]);
    // And without one a part of the training images is held out.
    let folder = Folder::new();
    for i in 0..10 {
        folder.picture(&format!("train/{i}.png"), [i; 3]);
    }
    let (colours, _, notes) = opened(&folder.config(), Split::Train);
    assert_eq!(colours.len(), 9);
    assert!(
        notes.contains("train/ (10), of which 0.1 are held out"),
        "{notes}"
    );
}

#[test]
fn what_is_left_out_is_counted() {
    let folder = Folder::new();
    folder.picture("1.png", [0; 3]);
    assert_eq!(opened(&folder.config(), Split::Train).2, "");
    for name in [
        "a.HEIC",
        "b.heic",
        "c.txt",
        "README",
        ".hidden.png",
        "x/d.txt",
    ] {
        folder.write(name, "");
    }
    for litter in [
        ".DS_Store",
        "._1.png",
        "Thumbs.db",
        "desktop.ini",
        "__MACOSX/1.png",
    ] {
        folder.write(litter, "");
    }
    let mut expected = 6;
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere.png", folder.path("broken.png")).unwrap();
        std::os::unix::fs::symlink("..", folder.path("x/around")).unwrap();
        std::os::unix::fs::symlink("1.png", folder.path("again.png")).unwrap();
        expected += 2;
    }
    let (colours, _, notes) = opened(&folder.config(), Split::Train);
    assert_eq!(
        colours.len(),
        1 + usize::from(cfg!(unix)) - usize::from(cfg!(unix))
    );
    assert!(
        notes.ends_with(&format!(
            "{expected} files are left out: 2 .heic, 2 .txt, 1 broken link, 1 hidden, \
             1 link to a folder around it, 1 without an extension"
        )),
        "{notes}"
    );
    let folder = Folder::new();
    folder.write("a.heic", "");
    assert_fails!(
        folder.config(),
        Split::Train,
        DataError::Empty { .. },
        "no pictures in it (1 file is left out: 1 .heic)"
    );
}

#[test]
fn folders_in_disorder_have_no_labels() {
    let folder = Folder::new();
    assert_fails!(
        folder.config(),
        Split::Train,
        DataError::Empty { .. },
        "no pictures in it: give a folder that holds PNG, JPEG"
    );
    folder.picture("a/1.png", [0; 3]);
    assert_eq!(
        open(
            &DataConfig {
                held_out: 0.0,
                ..folder.config()
            },
            Split::Train
        )
        .nr_classes(),
        0
    );
    assert_fails!(
        folder.config(),
        Split::Test,
        DataError::Empty { .. },
        "held-out"
    );
    folder.picture("c/1.png", [0; 3]);
    fs::create_dir(folder.path("b")).unwrap();
    let b = folder.path("b");
    let problem = || {
        let dataset = open(&folder.config(), Split::Train);
        assert_eq!(dataset.nr_classes(), 0);
        dataset.no_labels().unwrap().to_owned()
    };
    assert_eq!(
        problem(),
        format!("{} has no pictures of its class", b.display())
    );
    folder.picture("b/1.png", [0; 3]);
    folder.picture("1.png", [0; 3]);
    assert!(problem().contains("beside them"), "{}", problem());
}

#[test]
fn pictures_may_have_many_sizes() {
    let folder = Folder::new();
    folder.picture("a.png", [0; 3]);
    folder.write("b.png", png(RgbImage::new(7, 5)));
    folder.write("c.png", png(RgbImage::new(4, 4)));
    let all = DataConfig {
        held_out: 0.0,
        ..folder.config()
    };
    let mixed = open(&all, Split::Train);
    let sizes: Vec<[usize; 2]> = (0..3).map(|index| mixed.size(index)).collect();
    assert_eq!(sizes, [[4, 4], [5, 7], [4, 4]]);
    assert_eq!(mixed.largest(), [5, 7]);
    assert!(
        mixed
            .describe()
            .contains("3 images of many sizes up to 7x5x3")
    );
    let error = mixed.one_size().unwrap_err().to_string();
    assert!(
        error.contains("a.png is 4x4, b.png is 7x5: choose a size"),
        "{error}"
    );
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    mixed.read(&[1], &mut images, &mut labels).unwrap();
    assert_eq!(images.len(), 7 * 5 * 3);
    mixed.read(&[2, 0], &mut images, &mut labels).unwrap();
    assert_eq!(images.len(), 2 * 4 * 4 * 3);
    let error = mixed.read(&[0, 1], &mut images, &mut labels);
    assert!(matches!(error, Err(DataError::MixedSizes { .. })));
    // They are told apart from others by a few, of any sizes.
    assert!(mixed.fingerprint().unwrap().contains("many sizes"));
    let sized = open(&sized(folder.0.path(), 8), Split::Train);
    assert_eq!(sized.one_size().unwrap(), [8, 8]);

    folder.write("c.ppm", "P6 0 0 255 ");
    let error = Dataset::open(&all, Split::Train).unwrap_err().to_string();
    assert!(error.contains("it has no pixels"), "{error}");
    fs::remove_file(folder.0.path().join("c.ppm")).unwrap();

    folder.write("d.png", png(RgbImage::new(20_000, 1)));
    let sides = |error: &DataError| matches!(error, DataError::Sides { .. });
    let error = Dataset::open(&all, Split::Train).unwrap_err();
    assert!(sides(&error), "{error}");
}

/// The crops of three epochs.
fn crops(dataset: &Dataset) -> Vec<Vec<u8>> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let mut all = Vec::new();
    for epoch in 0..3 {
        let order = dataset.epoch_order(5, epoch);
        let read = dataset.read_in_epoch(5, epoch, &order, &mut images, &mut labels);
        read.unwrap();
        all.push(images.clone());
    }
    all
}

#[test]
fn pictures_beyond_memory_are_decoded_once() {
    let folder = Folder::new();
    let mut notes = Notes::default();
    for (n, (width, height)) in [(9, 30), (20, 8), (7, 40), (31, 17)]
        .into_iter()
        .enumerate()
    {
        let drawn = RgbImage::from_fn(width, height, |x, y| {
            Rgb([n as u8, (x * 7) as u8, (y * 5) as u8])
        });
        folder.write(&format!("{n}.png"), png(drawn));
    }
    let config = DataConfig {
        held_out: 0.0,
        ..config(folder.0.path())
    };
    let mut cropped = |room| {
        let whole = open(&config, Split::Train);
        let cropped = whole.cropped(8, room, &mut |told| notes.listen(told));
        cropped.unwrap()
    };
    let wanted = crops(&cropped(arrays::Room::default()));

    let spill = tempfile::tempdir().unwrap();
    let room = arrays::Room {
        memory: 3 * (9 * 30 + 20 * 8 + 7 * 40 + 31 * 17) - 1,
        spill: spill.path().join("not there yet"),
    };
    let dataset = cropped(room);
    assert_eq!(dataset.len(), wanted[0].len() / (8 * 8 * 3));
    let said = notes.0.pop().unwrap();
    assert!(said.contains("temporary file in "), "{said}");
    assert_eq!(crops(&dataset), wanted);
    // They are not needed any more.
    for n in 0..4 {
        fs::remove_file(folder.path(&format!("{n}.png"))).unwrap();
    }
    assert_eq!(crops(&dataset), wanted);
}

#[test]
fn crops_of_arrays_lie_in_their_images() {
    let folder = Folder::new();
    let values: Vec<u8> = (0..6 * 12 * 10 * 3).map(|i| (i * i / 7) as u8).collect();
    folder.write("x.npy", npy("|u1", "(6, 12, 10, 3)", &values));
    let config = DataConfig {
        held_out: 0.0,
        ..config(folder.0.path().join("x.npy"))
    };
    let dataset = open(&config, Split::Train);
    let room = arrays::Room::default();
    let dataset = dataset.cropped(4, room, &mut unheard).unwrap();
    // As many as cover each, in its own pixels.
    assert_eq!(dataset.len(), 6 * 7);
    for epoch in 0..3 {
        for crop in 0..dataset.len() {
            let (mut found, mut labels) = (Vec::new(), Vec::new());
            let read = dataset.read_in_epoch(5, epoch, &[crop], &mut found, &mut labels);
            read.unwrap();
            let image = &values[crop / 7 * 360..][..360];
            let lies_at = |top: usize, left: usize| {
                let mut rows = found.chunks_exact(12).enumerate();
                rows.all(|(y, row)| image[(top + y) * 30 + left * 3..].starts_with(row))
            };
            let mut places = (0..9).flat_map(|top| (0..7).map(move |left| (top, left)));
            assert!(places.any(|(top, left)| lies_at(top, left)), "crop {crop}");
        }
    }
}

#[test]
fn pictures_are_cropped_in_their_middle_and_resized() {
    let folder = Folder::new();
    // A white square in the middle of a wide black picture.
    let wide = RgbImage::from_fn(32, 16, |x, _| {
        Rgb([if (8..24).contains(&x) { 255 } else { 0 }; 3])
    });
    folder.write("a.png", png(wide.clone()));
    folder.write("b.png", png(image::imageops::rotate90(&wide)));
    // A checkerboard whose pixels average to grey when it shrinks to a quarter.
    folder.write(
        "c.png",
        png(RgbImage::from_fn(32, 32, |x, y| {
            Rgb([((x + y) % 2 * 255) as u8; 3])
        })),
    );
    for size in [8, 16, 20] {
        let config = DataConfig {
            held_out: 0.0,
            ..sized(folder.0.path(), size)
        };
        let (images, _) = read_all(&open(&config, Split::Train));
        assert!(images[..2].iter().flatten().all(|&v| v == 255), "{size}");
        if size == 8 {
            assert!(
                images[2].iter().all(|v| (118..=137).contains(v)),
                "no aliasing: {:?}",
                images[2]
            );
        }
    }
}

#[test]
fn kinds_of_pixels() {
    let folder = Folder::new();
    let all = || {
        open(
            &DataConfig {
                held_out: 0.0,
                ..folder.config()
            },
            Split::Train,
        )
    };
    folder.write("a.png", png(image::GrayImage::from_pixel(4, 4, Luma([9]))));
    folder.write(
        "b.png",
        png(image::ImageBuffer::from_pixel(4, 4, Luma([0x8080u16]))),
    );
    folder.write(
        "c.png",
        png(image::GrayAlphaImage::from_pixel(4, 4, LumaA([7, 0]))),
    );
    folder.write(
        "d.jpg",
        encode(
            image::GrayImage::from_pixel(4, 4, Luma([200])),
            ImageFormat::Jpeg,
        ),
    );
    assert_eq!(all().channels(), 1);
    let first = |image: &Vec<u8>| image[..all().channels()].to_vec();
    assert_eq!(
        read_all(&all()).0.iter().map(first).collect::<Vec<_>>(),
        [[9], [0x80], [7], [200]]
    );

    folder.write(
        "e.png",
        png(image::RgbaImage::from_pixel(4, 4, Rgba([1, 2, 3, 0]))),
    );
    folder.write(
        "f.png",
        png(image::ImageBuffer::from_pixel(
            4,
            4,
            Rgb([0xffffu16, 0, 0x4040]),
        )),
    );
    assert_eq!(all().channels(), 3);
    let expected = [
        [9; 3],
        [0x80; 3],
        [7; 3],
        [200; 3],
        [1, 2, 3],
        [255, 0, 0x40],
    ];
    assert_eq!(
        read_all(&all()).0.iter().map(first).collect::<Vec<_>>(),
        expected
    );

    // A photo that is to be turned by a quarter.
    let folder = Folder::new();
    let mut photo = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new(&mut photo);
    let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    encoder.set_exif_metadata(exif.to_vec()).unwrap();
    let left_half = RgbImage::from_fn(16, 8, |x, _| Rgb([if x < 8 { 255 } else { 0 }; 3]));
    encoder.encode_image(&left_half).unwrap();
    folder.write("a.jpeg", photo);
    let dataset = open(&folder.config(), Split::Train);
    assert_eq!([dataset.height(), dataset.width()], [16, 8]);
    let image = &read_all(&dataset).0[0];
    assert!(
        image[..8 * 8 * 3].iter().all(|&v| v > 250) && image[8 * 8 * 3..].iter().all(|&v| v < 5)
    );
}

#[test]
fn damaged_pictures_are_named() {
    let noise = |seed: u32| {
        RgbImage::from_fn(64, 64, |x, y| {
            Rgb([
                ((x * 31) ^ (y * 17) ^ seed) as u8,
                (x * y) as u8,
                seed as u8,
            ])
        })
    };
    for (name, format) in [
        ("bad.png", ImageFormat::Png),
        ("bad.jpg", ImageFormat::Jpeg),
    ] {
        let folder = Folder::new();
        for i in 0..3 {
            folder.write(&format!("{i}.png"), png(noise(i)));
        }
        let config = DataConfig {
            held_out: 0.0,
            ..folder.config()
        };
        let whole = encode(noise(9), format);
        for header in [
            &whole[..20],
            b"",
            b"GIF89a cut off",
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\0",
        ] {
            folder.write(name, header);
            assert_fails!(config, Split::Train, DataError::Damaged(_), name);
        }
        // That the end is there is seen on opening it,
        folder.write(name, &whole[..whole.len() * 2 / 3]);
        assert_fails!(config, Split::Train, DataError::Damaged(_), name, "1 of 4");
        let skipping = DataConfig {
            skip_damaged: true,
            ..config.clone()
        };
        let (colours, _, notes) = opened(&skipping, Split::Train);
        assert_eq!(colours.len(), 3);
        assert!(
            notes.contains("skipped: 1 of 4 pictures") && notes.contains(name),
            "{notes}"
        );
        // the rest when it is read: of a file that is cut only then, say.
        folder.write(name, &whole);
        let dataset = open(&config, Split::Train);
        folder.write(name, &whole[..whole.len() * 2 / 3]);
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        let error = dataset
            .read(&[0, 1, 2, 3], &mut images, &mut labels)
            .unwrap_err();
        assert!(
            matches!(&error, DataError::Picture { .. }) && error.to_string().contains(name),
            "{error}"
        );
        dataset.read(&[0, 1, 2], &mut images, &mut labels).unwrap();
        // A file that has been exchanged in the meantime.
        folder.write(name, encode(RgbImage::new(32, 32), format));
        let error = dataset.read(&[3], &mut images, &mut labels).unwrap_err();
        assert!(error.to_string().contains("changed"), "{error}");
        folder.write(name, whole);
        dataset.read(&[3], &mut images, &mut labels).unwrap();
    }
    // Many are named up to a point, of both splits together.
    let folder = Folder::new();
    folder.picture("train/whole.png", [0; 3]);
    for i in 0..12 {
        folder.write(&format!("train/{i}.png"), "");
        folder.write(&format!("test/{i}.png"), "");
    }
    let error = Dataset::open_splits(&folder.config()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("24 of 25 pictures can't be read: "),
        "{text}"
    );
    assert!(text.contains(" and 14 more"), "{text}");
    assert_eq!(text.matches(".png").count(), 10, "{text}");

    // A header that promises more than it holds takes no memory.
    let folder = Folder::new();
    let mut huge = png(RgbImage::new(4, 4));
    huge[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xfc, 0x7f, 0xff, 0xff, 0xfc]);
    let mut crc = flate2::Crc::new();
    crc.update(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    folder.write("a.png", &huge);
    failure(&folder.config(), Split::Train);
    let error = Dataset::open(&sized(folder.0.path(), 8), Split::Train)
        .and_then(|dataset| dataset.read(&[0], &mut Vec::new(), &mut Vec::new()))
        .unwrap_err();
    assert!(matches!(error, DataError::Damaged(_)), "{error}");
    // Nor does one that is within reason, but for the limit.
    huge[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let mut crc = flate2::Crc::new();
    crc.update(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    folder.write("a.png", &huge);
    let error = Dataset::open(&sized(folder.0.path(), 8), Split::Train)
        .and_then(|dataset| dataset.read(&[0], &mut Vec::new(), &mut Vec::new()))
        .unwrap_err();
    assert!(error.to_string().contains("more than 512 MiB"), "{error}");
}

fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn a_tar_is_read_like_the_folder_it_unpacks_to() {
    let folder = Folder::new();
    let mut files = Vec::new();
    for i in 0..30u8 {
        let name = format!(
            "{}/{}{i}.png",
            ["cat", "cat-like", "dog"][usize::from(i % 3)],
            "long".repeat(40)
        );
        let path = folder.picture(&format!("unpacked/{name}"), [i, 0, 0]);
        files.push((format!("./everything/{name}"), fs::read(path).unwrap()));
    }
    files.reverse();
    let tar = folder.write("a.tar", tar_of(&files));
    for split in [Split::Train, Split::Test] {
        let (packed, unpacked) = (
            open(&config(&tar), split),
            open(&config(folder.path("unpacked")), split),
        );
        assert_eq!(packed.class_names(), ["cat", "cat-like", "dog"]);
        assert_eq!(read_all(&packed), read_all(&unpacked));
        assert_eq!(read(&packed, &[2, 0]), read(&unpacked, &[2, 0]));
    }

    let bytes = tar_of(&files);
    let last = files.last().unwrap().1.len();
    let end = bytes.len() - 1024 - last.next_multiple_of(512);
    let cut = folder.write("cut.tar", &bytes[..end + last / 2]);
    assert_fails!(
        config(&cut),
        Split::Train,
        DataError::Picture { .. },
        "cut.tar: everything/cat/",
        "cut off"
    );
    let not = folder.write("not.tar", [7; 2000]);
    assert_fails!(config(&not), Split::Train, DataError::Io { .. }, "not.tar");
    let empty = folder.write("empty.tar", "");
    assert_fails!(
        config(&empty),
        Split::Train,
        DataError::Empty { .. },
        "empty.tar"
    );
    files[3].1.truncate(45);
    let damaged = folder.write("damaged.tar", tar_of(&files));
    let all = DataConfig {
        held_out: 0.0,
        ..config(&damaged)
    };
    assert_fails!(
        all,
        Split::Train,
        DataError::Damaged(_),
        "1 of 30",
        "damaged.tar: everything/"
    );
}

#[test]
fn links_in_a_tar_are_followed() {
    let folder = Folder::new();
    let picture = |i: u8| png(RgbImage::from_pixel(4, 4, Rgb([i, 0, 0])));
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    for (name, i) in [("photos/0.png", 7), ("photos/0.png", 0), ("photos/raw", 1)] {
        let bytes = picture(i);
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    header.set_size(0);
    for (kind, name, target) in [
        (tar::EntryType::Link, "photos/hard.png", "photos/0.png"),
        (
            tar::EntryType::Symlink,
            "photos/soft.png",
            "../photos/./raw",
        ),
        (tar::EntryType::Symlink, "photos/chain.png", "soft.png"),
        (tar::EntryType::Symlink, "photos/lost.png", "nowhere.png"),
        (tar::EntryType::Symlink, "photos/round.png", "round.png"),
        (tar::EntryType::Symlink, "photos/out.png", "/etc/passwd"),
        (tar::EntryType::Symlink, "photos/above.png", "../../x.png"),
        (tar::EntryType::Symlink, "again", "photos"),
        (tar::EntryType::Symlink, "photos/around", "."),
    ] {
        header.set_entry_type(kind);
        archive.append_link(&mut header, name, target).unwrap();
    }
    let tar = folder.write("a.tar", archive.into_inner().unwrap());
    let all = DataConfig {
        held_out: 0.0,
        ..config(&tar)
    };
    let (dataset, notes) = open_told(&all, Split::Train);
    let names: Vec<_> = (0..dataset.len())
        .filter_map(|i| dataset.image_name(i))
        .collect();
    assert_eq!(
        names,
        [
            "again/0.png",
            "photos/0.png",
            "photos/chain.png",
            "photos/hard.png",
            "photos/soft.png"
        ]
    );
    let colours: Vec<u8> = read_all(&dataset).0.iter().map(|image| image[0]).collect();
    assert_eq!(colours, [0, 0, 1, 0, 1]);
    assert!(
        notes.ends_with(
            "7 files are left out: 5 link that leads nowhere in it, 2 without an extension"
        ),
        "{notes}"
    );
}

#[test]
fn what_is_only_called_a_tar_is_named() {
    let folder = Folder::new();
    for (start, what) in [
        (&b"\x1f\x8b\x08\0"[..], "gzip"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
    ] {
        let path = folder.write("a.tar", start);
        assert_fails!(
            config(&path),
            Split::Train,
            DataError::Config(_),
            what,
            "unpack"
        );
    }
}

// Downsampled ImageNet.

fn imagenet(folder: &Folder) -> DataConfig {
    DataConfig {
        data_dir: Some(folder.0.path().to_owned()),
        ..config("imagenet32")
    }
}

#[test]
fn imagenet_as_pictures() {
    let folder = Folder::new();
    let config = imagenet(&folder);
    assert_fails!(
        config,
        Split::Test,
        DataError::NoDataDir { .. },
        "valid_32x32.tar",
        "image-net.org",
        "data_dir"
    );
    let picture = |i: u8| png(RgbImage::from_pixel(32, 32, Rgb([i, 1, 2])));
    let files: Vec<_> = (0..5)
        .map(|i| (format!("train_32x32/{i}.png"), picture(i)))
        .collect();
    folder.write("train_32x32.tar", tar_of(&files));
    assert_fails!(
        config,
        Split::Test,
        DataError::NoDataDir { .. },
        "valid_32x32.tar"
    );
    let root = folder.0.path().display();
    let found = format!("ImageNet 32x32 train: pictures in {root}/train_32x32.tar");
    let (_, told) = open_told(&config, Split::Train);
    assert_eq!(
        told,
        format!("{found}; valid_32x32.tar, for testing, is missing")
    );
    folder.write("valid_32x32/1.png", picture(100));
    folder.write("valid_32x32/2.png", picture(101));
    folder.write("train_data_batch_3.npz", "");
    let (_, told) = open_told(&config, Split::Train);
    assert_eq!(
        told,
        format!("{found}; npz batches are there too and not used")
    );
    let inside = DataConfig {
        data_dir: Some(folder.path("valid_32x32")),
        ..config.clone()
    };
    assert_eq!(open(&inside, Split::Train).len(), 5);
    let (train, test) = (open(&config, Split::Train), open(&config, Split::Test));
    assert_eq!(
        train.describe(),
        "ImageNet 32x32 train: 5 images 32x32x3, no labels"
    );
    let colours = |dataset| {
        read_all(dataset)
            .0
            .iter()
            .map(|image| image[0])
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (colours(&train), colours(&test)),
        (vec![0, 1, 2, 3, 4], vec![100, 101])
    );
    folder.write("valid_32x32/1.png", png(RgbImage::new(64, 64)));
    folder.write("valid_32x32/2.png", png(RgbImage::new(64, 64)));
    assert_fails!(
        config,
        Split::Test,
        DataError::Config(_),
        "64x64x3, not 32x32x3"
    );
}

/// A batch of `images`. Image `i`: red i, green 10, blue the column.
fn batch(side: usize, images: Range<u8>, labels: &[i64]) -> Vec<u8> {
    let area = side * side;
    let planes = images
        .clone()
        .flat_map(|i| (0..3 * area).map(move |p| [i, 10, (p % side) as u8][p / area]));
    let data = npy(
        "|u1",
        &format!("({}, {})", images.len(), 3 * area),
        &planes.collect::<Vec<_>>(),
    );
    npz(&[
        ("data", data),
        ("labels", labels_npy(labels)),
        ("mean", npy("<f4", "(1,)", &[0; 4])),
    ])
}

#[test]
fn imagenet_as_batches() {
    let batch = |images, labels: &[i64]| batch(32, images, labels);
    let folder = Folder::new();
    let config = imagenet(&folder);
    for i in 1..=10u8 {
        folder.write(
            &format!("Imagenet32_train_npz/train_data_batch_{i}.npz"),
            batch(2 * i..2 * i + 2, &[i64::from(i), 1000]),
        );
    }
    folder.write("val_data.npz", batch(0..1, &[7]));
    let train = open(&config, Split::Train);
    assert_eq!(
        train.describe(),
        "ImageNet 32x32 train: 20 images 32x32x3, 1000 classes"
    );
    let (images, labels) = read(&train, &[19, 4]);
    assert_eq!(labels, [999, 2]);
    assert_eq!(images[0][..6], [21, 10, 0, 21, 10, 1]);
    assert_eq!(images[1][3069..], [6, 10, 31]);
    assert_eq!(read_all(&open(&config, Split::Test)).1, [6]);

    let root = folder.0.path().display();
    let told = |split| open_told(&config, split).1;
    assert_eq!(
        told(Split::Train),
        format!("ImageNet 32x32 train: 10 batches in {root}/Imagenet32_train_npz")
    );
    assert_eq!(
        told(Split::Test),
        format!("ImageNet 32x32 test: val_data.npz in {root}")
    );

    fs::remove_file(folder.path("Imagenet32_train_npz/train_data_batch_7.npz")).unwrap();
    assert_fails!(
        config,
        Split::Train,
        DataError::NotFound { .. },
        "train_data_batch_7.npz"
    );
    for labels in [&[0][..], &[1001], &[1, 2]] {
        folder.write("val_data.npz", batch(0..1, labels));
        assert_fails!(
            config,
            Split::Test,
            DataError::Array { .. },
            "val_data.npz",
            "labels"
        );
    }
    folder.write(
        "val_data.npz",
        npz(&[
            ("data", npy("|u1", "(1, 12288)", &[0; 12288])),
            ("labels", labels_npy(&[1])),
        ]),
    );
    assert_fails!(
        config,
        Split::Test,
        DataError::Array { .. },
        "not [N, 3072]"
    );
    folder.write(
        "val_data.npz",
        npz(&[("data", npy("|u1", "(1, 3072)", &[0; 3072]))]),
    );
    assert_fails!(config, Split::Test, DataError::Array { .. }, "labels");
}

/// As the official archives of ImageNet 64 unpack, into three folders.
fn imagenet64() -> (Folder, DataConfig) {
    let folder = Folder::new();
    for i in 1..=10u8 {
        let part = if i <= 5 { 1 } else { 2 };
        folder.write(
            &format!("Imagenet64_train_part{part}_npz/train_data_batch_{i}.npz"),
            batch(64, i..i + 1, &[i64::from(i)]),
        );
    }
    folder.write(
        "Imagenet64_val_npz/val_data.npz",
        batch(64, 50..52, &[1000, 1]),
    );
    let config = DataConfig {
        data: "imagenet64".into(),
        ..imagenet(&folder)
    };
    (folder, config)
}

#[test]
fn imagenet64_in_the_folders_of_its_archives() {
    let (folder, mut config) = imagenet64();
    let root = folder.0.path().display().to_string();
    let check = |config: &DataConfig| {
        let (train, told) = open_told(config, Split::Train);
        assert_eq!(
            train.describe(),
            "ImageNet 64x64 train: 10 images 64x64x3, 1000 classes"
        );
        let (images, labels) = read_all(&train);
        assert_eq!(labels, (0..10).collect::<Vec<_>>());
        let reds: Vec<u8> = images.iter().map(|image| image[0]).collect();
        assert_eq!(reds, (1..=10).collect::<Vec<_>>());
        assert_eq!(images[9][12285..], [10, 10, 63]);
        let (images, labels) = read_all(&open(config, Split::Test));
        assert_eq!((images[1][0], labels), (51, vec![999, 0]));
        told
    };
    let [one, two, val] = ["train_part1_npz", "train_part2_npz", "val_npz"]
        .map(|name| folder.path(&format!("Imagenet64_{name}")));
    let told = check(&config);
    assert_eq!(
        told,
        format!(
            "ImageNet 64x64 train: 10 batches in {} and {}",
            one.display(),
            two.display()
        )
    );
    // One of the folders is given.
    for part in [&one, &two, &val] {
        config.data_dir = Some(part.clone());
        check(&config);
    }
    config.data_dir = Some(folder.0.path().to_owned());
    // An archive unpacked into a folder of its name.
    fs::rename(&two, folder.path("two")).unwrap();
    fs::create_dir(&two).unwrap();
    fs::rename(folder.path("two"), two.join("Imagenet64_train_part2_npz")).unwrap();
    check(&config);
    // All files in one folder.
    for part in [&one, &two.join("Imagenet64_train_part2_npz"), &val] {
        for entry in fs::read_dir(part).unwrap() {
            let path = entry.unwrap().path();
            fs::rename(
                &path,
                folder.path(path.file_name().unwrap().to_str().unwrap()),
            )
            .unwrap();
        }
    }
    let told = check(&config);
    assert_eq!(told, format!("ImageNet 64x64 train: 10 batches in {root}"));
}

#[test]
fn what_imagenet64_lacks_is_named() {
    let (folder, config) = imagenet64();
    let [one, two, val] = ["train_part1_npz", "train_part2_npz", "val_npz"]
        .map(|name| folder.path(&format!("Imagenet64_{name}")));
    fs::remove_dir_all(&val).unwrap();
    let (_, told) = open_told(&config, Split::Train);
    assert!(
        told.ends_with("; val_data.npz, for testing, is missing"),
        "{told}"
    );
    folder.write("Imagenet64_val/val_data", b"\x80\x02}q\x00");
    assert_fails!(
        config,
        Split::Test,
        DataError::NotFound { .. },
        "val_data.npz not found: ",
        "Imagenet64_val/val_data is pickled",
        "download Imagenet64_val_npz.zip from https://image-net.org"
    );

    fs::remove_file(one.join("train_data_batch_2.npz")).unwrap();
    fs::remove_dir_all(&two).unwrap();
    let lacks = "train_data_batch_2.npz, train_data_batch_6.npz, train_data_batch_7.npz, \
                 train_data_batch_8.npz, train_data_batch_9.npz, train_data_batch_10.npz not found: \
                 4 of 10 batches are in ";
    assert_fails!(
        config,
        Split::Train,
        DataError::NotFound { .. },
        lacks,
        "Imagenet64_train_part1_npz; download Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip from"
    );
    folder.write("Imagenet64_train_part1_npz.zip", "PK");
    assert_fails!(
        config,
        Split::Train,
        DataError::NotFound { .. },
        lacks,
        "Imagenet64_train_part1_npz.zip; download Imagenet64_train_part2_npz.zip from"
    );

    // Batches pickled for Python, packed and unpacked, and nothing else.
    for pickled in [
        "train_data_batch_1",
        "Imagenet64_train_part1/train_data_batch_1",
        "Imagenet64_train_part1.zip",
    ] {
        let folder = Folder::new();
        let config = DataConfig {
            data_dir: Some(folder.0.path().to_owned()),
            ..config.clone()
        };
        assert_fails!(
            config,
            Split::Train,
            DataError::NoDataDir { .. },
            "imagenet64 not found"
        );
        folder.write(pickled, b"\x80\x02}q\x00");
        assert_fails!(
            config,
            Split::Train,
            DataError::NotFound { .. },
            "train_data_batch_1.npz, train_data_batch_2.npz",
            &format!("{pickled} is pickled for Python, which is not read"),
            "Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip"
        );
    }
}

// Damage anywhere.

/// Opens and reads it whole: an error or data.
fn survives(path: &Path) -> Result<(), TestCaseError> {
    for split in [Split::Train, Split::Test] {
        let result = Dataset::open(&config(path), split).and_then(|dataset| {
            let indices: Vec<usize> = (0..dataset.len().min(64)).collect();
            dataset.read(&indices, &mut Vec::new(), &mut Vec::new())
        });
        if let Err(error) = result {
            prop_assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damage_is_an_error_or_other_data(
        kind in 0..5usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let arrays = [("trainx", images_npy(3)), ("trainy", labels_npy(&[0, 1, 2])), ("testx", images_npy(2)), ("testy", npy("<f4", "(2L, 2L)", &[0; 16]))];
        let picture = png(RgbImage::from_fn(8, 8, |x, y| Rgb([x as u8, y as u8, 0])));
        let (name, mut bytes) = match kind {
            0 => ("a.npy", images_npy(5)),
            1 => ("a.npz", npz(&arrays)),
            2 => ("a.npz", stored_npz("x", &images_npy(5))),
            3 => ("a.tar", tar_of(&[("a/1.png".into(), picture.clone()), ("b/2.png".into(), picture)])),
            _ => ("folder/a.jpg", encode(RgbImage::new(8, 8), ImageFormat::Jpeg)),
        };
        for (index, byte) in flips {
            let i = index.index(bytes.len());
            bytes[i] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = Folder::new();
        let path = folder.write(name, bytes);
        survives(if kind == 4 { path.parent().unwrap() } else { &path })?;
    }
}

// Codes.

fn codes_config(path: &Path) -> DataConfig {
    DataConfig {
        data: path.to_str().unwrap().to_owned(),
        codes: 1,
        ..DataConfig::default()
    }
}

/// `n` maps 4 x 4, all different, as little-endian numbers of so many bytes.
fn code_bytes(n: usize, size: usize) -> Vec<u8> {
    let code = |i: usize| (i * 37 % 700) as u64;
    let bytes = |i| code(i).to_le_bytes()[..size].to_vec();
    (0..16 * n).flat_map(bytes).collect()
}

fn codes_npy(n: usize) -> Vec<u8> {
    npy("<u2", &format!("({n}, 4, 4)"), &code_bytes(n, 2))
}

/// The same maps, whatever the type; and either split has those that it should.
#[test]
fn codes_are_whole_numbers_of_any_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.npy");
    let want: Vec<u16> = (0..320).map(|i| (i * 37 % 700) as u16).collect();
    let floats: Vec<u8> = want
        .iter()
        .flat_map(|&code| f32::from(code).to_le_bytes())
        .collect();
    let big: Vec<u8> = want.iter().flat_map(|code| code.to_be_bytes()).collect();
    for (descr, data) in [
        ("<u2", code_bytes(20, 2)),
        ("<i4", code_bytes(20, 4)),
        ("<i8", code_bytes(20, 8)),
        ("<f4", floats),
        (">u2", big),
    ] {
        fs::write(&path, npy(descr, "(20, 4, 4)", &data)).unwrap();
        let maps = CodeMaps::read(&path).unwrap();
        assert_eq!((maps.shape, &maps.codes), ([20, 4, 4], &want), "{descr}");
    }
    let config = codes_config(&path);
    let (train, test) = Dataset::open_splits(&config).unwrap();
    assert_eq!((train.len(), test.len()), (18, 2));
    assert_eq!(train.codes().unwrap()[1], 0);
    assert!(train.describe().contains("18 maps 4x4 of 700 codes"));
    let mut all: Vec<Vec<u8>> = Vec::new();
    for split in [&train, &test] {
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        let indices: Vec<usize> = (0..split.len()).collect();
        split.read(&indices, &mut images, &mut labels).unwrap();
        assert!(labels.is_empty());
        all.extend(images.chunks(32).map(<[u8]>::to_vec));
    }
    all.sort_unstable();
    let mut wanted: Vec<Vec<u8>> = code_bytes(20, 2).chunks(32).map(<[u8]>::to_vec).collect();
    wanted.sort_unstable();
    assert_eq!(all, wanted);
}

#[test]
fn codes_come_with_coarser_maps_and_labels() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.npz");
    let coarse = |n: usize| npy("|u1", &format!("({n}, 2, 2)"), &vec![7; 4 * n]);
    let arrays = [
        ("codes_train", codes_npy(6)),
        ("codes_test", codes_npy(3)),
        ("top_train", coarse(6)),
        ("top_test", coarse(3)),
        ("y_train", labels_npy(&[0, 1, 2, 0, 1, 2])),
        ("y_test", labels_npy(&[2, 1, 0])),
    ];
    fs::write(&path, npz(&arrays)).unwrap();
    let alone = codes_config(&path);
    let (train, notes) = open_told(&alone, Split::Train);
    assert_eq!(
        (train.codes(), train.bytes_per_pixel()),
        (Some([679, 0]), 2)
    );
    assert!(notes.contains("not used: top_test, top_train"), "{notes}");
    let both = DataConfig { codes: 2, ..alone };
    let (train, notes) = open_told(&both, Split::Train);
    let (test, _) = open_told(&both, Split::Test);
    assert_eq!(notes, "");
    assert_eq!((train.len(), test.len(), train.nr_classes()), (6, 3, 3));
    assert_eq!(train.codes(), Some([679, 8]));
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    test.read(&[1], &mut images, &mut labels).unwrap();
    assert_eq!(labels, [1]);
    let pixels = images.chunks(4).map(|pixel| pixel[..2].to_vec());
    assert_eq!(pixels.collect::<Vec<_>>().concat(), code_bytes(2, 2)[32..]);
    assert!(images.chunks(4).all(|pixel| pixel[2..] == [7, 0]));

    for (wrong, because) in [
        (coarse(5), "do not lie over"),
        (npy("|u1", "(6, 3, 3)", &[7; 54]), "do not lie over"),
        (npy("<i2", "(6, 2, 2)", &[0xff; 48]), "whole and from 0"),
    ] {
        let arrays = [("codes", codes_npy(6)), ("coarse", wrong)];
        fs::write(&path, npz(&arrays)).unwrap();
        let error = Dataset::open(&both, Split::Train).unwrap_err();
        assert!(error.to_string().contains(because), "{error}");
    }
}

#[test]
fn coarser_maps_that_are_wanted_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.npz");
    fs::write(&path, npz(&[("codes", codes_npy(6))])).unwrap();
    let both = DataConfig {
        codes: 2,
        ..codes_config(&path)
    };
    let error = Dataset::open(&both, Split::Train).unwrap_err().to_string();
    assert!(error.contains("coarse_train"), "{error}");
    // Not of images.
    let images = DataConfig {
        codes: 1,
        ..DataConfig::default()
    };
    assert!(Dataset::open(&images, Split::Train).is_err());
    fs::write(&path, npz(&[("codes", npy("|u1", "(2, 7, 7)", &[1; 98]))])).unwrap();
    let odd = Dataset::open(&codes_config(&path), Split::Train).unwrap();
    assert_eq!([odd.height(), odd.width()], [7, 7]);
}

/// Whatever is wrong with a file, it is said in a line; cut off anywhere, nothing is read.
#[test]
fn what_holds_no_codes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.npy");
    let refused = |file: &[u8], because: &str| {
        fs::write(&path, file).unwrap();
        let error = CodeMaps::read(&path).unwrap_err().to_string();
        assert!(error.contains(because), "{error}");
        assert!(!error.contains('\n'));
    };
    let halves: Vec<u8> = (0..32).flat_map(|_| 0.5f32.to_le_bytes()).collect();
    refused(
        &npy("<f4", "(2, 4, 4)", &halves),
        "whole and from 0 to 65535",
    );
    refused(
        &npy("<i4", "(1, 4, 4)", &[0xff; 64]),
        "whole and from 0 to 65535",
    );
    let many: Vec<u8> = (0..16).flat_map(|_| 65_536u32.to_le_bytes()).collect();
    refused(&npy("<u4", "(1, 4, 4)", &many), "whole and from 0 to 65535");
    refused(&npy("<u2", "(2, 4, 4, 1)", &code_bytes(2, 2)), "[N, H, W]");
    refused(&npy("<U4", "(1, 4, 4)", &[0; 64]), "not numbers");
    refused(&npy("<u2", "(0, 4, 4)", &[]), "empty");
    refused(&npy("<u2", "(1099511627776, 4, 4)", &[]), "its header says");
    let whole = codes_npy(4);
    for length in (0..whole.len()).step_by(7) {
        refused(&whole[..length], "");
    }
    fs::write(&path, &whole).unwrap();
    assert!(CodeMaps::read(&path).is_ok());
}

/// Of codes that follow one another in a circle, a table of pairs knows all but the first; a histogram
/// nothing.
#[test]
fn tables_need_what_is_known_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.npz");
    let circle = |n: usize| {
        let code = |i: usize| ((i / 64 * 5 + i % 64 / 8 + i % 8) % 8) as u8;
        let codes: Vec<u8> = (0..64 * n).map(code).collect();
        npy("|u1", &format!("({n}, 8, 8)"), &codes)
    };
    let arrays = [("codes_train", circle(400)), ("codes_test", circle(40))];
    fs::write(&path, npz(&arrays)).unwrap();
    let (train, test) = Dataset::open_splits(&codes_config(&path)).unwrap();
    let Baselines { histogram, bigram } = baselines(&train, &test).unwrap().unwrap();
    assert!((histogram - 3.0).abs() < 1e-3, "{histogram}");
    assert!((bigram - 3.0 / 64.0).abs() < 0.01, "{bigram}");
}
