//! What a file says against what is in it: honest ones, damaged ones and hostile ones.

use std::io::Cursor;

use super::*;
use crate::Augmentation;
use crate::network::draw_parameters;
use proptest::prelude::*;

fn config() -> ModelConfig {
    ModelConfig {
        height: 4,
        width: 8,
        channels: 1,
        nr_resnet: 1,
        nr_filters: 3,
        nr_logistic_mix: 2,
        nr_classes: 2,
        ..ModelConfig::default()
    }
}

fn model(seed: u64) -> CodingModel {
    CodingModel::new(&config(), &draw_parameters(&config(), seed)).unwrap()
}

fn pictures(names: &[&str]) -> Vec<Picture> {
    let picture = |(i, name): (usize, &&str)| Picture {
        name: (*name).into(),
        class: i as u32 % 2,
        levels: (0..32)
            .map(|at| (at * at * (i + 7) + 31 * i) as u8)
            .collect(),
    };
    names.iter().enumerate().map(picture).collect()
}

fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn compressed(pictures: &[Picture]) -> Vec<u8> {
    compress(&model(1), pictures, 64, &mut go_on).unwrap()
}

fn open(file: &[u8]) -> Result<Archive<Cursor<&[u8]>>, CompressError> {
    Archive::new(Cursor::new(file))
}

type Images = Vec<Result<Vec<u8>, Damage>>;

fn decompressed(file: &[u8]) -> Result<Images, CompressError> {
    let mut archive = open(file)?;
    let all: Vec<usize> = (0..archive.entries().len()).collect();
    archive.decompress(&model(1), &all, &mut go_on)
}

#[test]
fn pictures_come_back_each_without_the_others() {
    for count in [0, 1, 5] {
        let names = &["a/1.png", "a/2.png", "b.jpg", "日本/ü.png", "9"][..count];
        let pictures = pictures(names);
        let file = compressed(&pictures);
        let mut archive = open(&file).unwrap();
        assert_eq!(archive.model(), model(1).hash());
        assert_eq!(archive.shape(), [4, 8, 1]);
        for (i, picture) in pictures.iter().enumerate().rev() {
            let entry = &archive.entries()[i];
            assert_eq!((&entry.name, entry.class), (&picture.name, picture.class));
            assert_eq!(archive.position(&picture.name), Some(i));
            let one = archive.decompress(&model(1), &[i], &mut go_on);
            assert_eq!(one.unwrap(), [Ok(picture.levels.clone())]);
        }
        assert_eq!(archive.position("c"), None);
        let some = archive.decompress(&model(1), &[], &mut go_on).unwrap();
        assert_eq!(some, []);
        let whole = decompressed(&[&file[..], b"and more"].concat()).unwrap();
        assert!(
            whole
                .iter()
                .zip(&pictures)
                .all(|(got, p)| got.as_ref() == Ok(&p.levels))
        );
    }
}

#[test]
fn every_flip_and_every_cut_is_noticed() {
    let pictures = pictures(&["a.png", "b.png", "c.png"]);
    let file = compressed(&pictures);
    let ends: Vec<usize> = {
        let archive = open(&file).unwrap();
        let entries = archive.entries().iter();
        entries
            .map(|entry| (entry.start + entry.bytes) as usize)
            .collect()
    };
    let start = open(&file).unwrap().entries[0].start as usize;
    assert_eq!(ends[2], file.len());
    for at in 0..file.len() {
        let image = ends.iter().position(|end| at < *end).unwrap();
        for flip in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
            let mut flipped = file.clone();
            flipped[at] ^= flip;
            match decompressed(&flipped) {
                Err(_) => assert!(at < start, "byte {at}"),
                Ok(images) => {
                    assert!(at >= start, "byte {at}");
                    for (i, (got, picture)) in images.iter().zip(&pictures).enumerate() {
                        match i == image {
                            true => assert_eq!(*got, Err(Damage::Altered), "byte {at}"),
                            false => assert_eq!(got.as_ref(), Ok(&picture.levels)),
                        }
                    }
                }
            }
        }
        match decompressed(&file[..at]) {
            Err(error) => assert!(at < start, "{at}: {error}"),
            Ok(images) => {
                assert!(at >= start);
                for ((got, picture), end) in images.iter().zip(&pictures).zip(&ends) {
                    match at < *end {
                        true => assert_eq!(*got, Err(Damage::Cut)),
                        false => assert_eq!(got.as_ref(), Ok(&picture.levels)),
                    }
                }
            }
        }
    }
}

/// A file whose checksum is right, whatever it says.
fn forged(numbers: [u64; 5], index: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut file = [&MAGIC[..], &[VERSION], &model(1).hash().0].concat();
    numbers.iter().for_each(|number| varint(&mut file, *number));
    file.extend(index);
    let checksums = (numbers[3] as usize * CHECKSUM).min(rest.len());
    file.extend(&rest[..checksums]);
    file.extend(crc32c(&file).to_le_bytes());
    file.extend(&rest[checksums..]);
    file
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn names_only(names: &[&[u8]]) -> Vec<u8> {
    let mut index = Vec::new();
    for name in names {
        varint(&mut index, 1);
        varint(&mut index, name.len() as u64);
        index.extend(*name);
    }
    index.extend(vec![0; 3 * names.len()]);
    index
}

#[test]
fn files_that_lie_are_refused() {
    let forge = |count: u64, index: &[u8]| {
        let index = deflated(index);
        let file = forged([4, 8, 1, count, index.len() as u64], &index, &[0; 99]);
        open(&file).map(|archive| archive.entries)
    };
    let honest = names_only(&[b"a", b"b"]);
    assert_eq!(forge(2, &honest).unwrap()[1].name, "b");
    let damaged = |count: u64, index: &[u8]| {
        let refused = forge(count, index);
        assert!(
            matches!(refused, Err(CompressError::Damaged(_))),
            "{index:?}: {refused:?}"
        );
    };
    // More or fewer images, or bytes, than there are.
    [0, 1, 3, 20, 1 << 20, u32::MAX.into()]
        .iter()
        .for_each(|&count| damaged(count, &honest));
    damaged(2, &[&honest[..], &[0]].concat());
    damaged(2, &honest[..honest.len() - 1]);
    // More inflated than any names could be.
    damaged(2, &vec![0; 50_000_000]);
    // A name that continues what is not there, is no successor, is too long or no text.
    damaged(1, &[5, 0, 0, 0, 0]);
    damaged(1, &[0, 0, 0, 0]);
    damaged(1, &names_only(&[&[b'a'; 256]]));
    damaged(1, &names_only(&[b"\xff"]));
    damaged(1, &[1, 255, 255, 255, 255, 15, b'a', 0, 0, 0]);
    damaged(1, &[1, 1, b'a', 255, 255, 255, 255, 255, 255, 0, 0]);
    // Names that lead elsewhere.
    for name in [
        "", "/a", "a/../b", "..", ".", "a//b", "a/", "./a", "a\nb", "a\0", "\u{9b}1",
    ] {
        let refused = forge(1, &names_only(&[name.as_bytes()]));
        assert!(
            matches!(refused, Err(CompressError::Name { .. })),
            "{name}: {refused:?}"
        );
        let refused = compress(&model(1), &pictures(&[name]), 1, &mut go_on);
        assert!(
            matches!(refused, Err(CompressError::Name { .. })),
            "{name}: {refused:?}"
        );
    }
    let twice = forge(2, &names_only(&[b"a", b"a"]));
    assert!(matches!(twice, Err(CompressError::Name { .. })));

    // Lengths beyond the file, which only the images notice; a class that the model has not.
    let index = deflated(&[
        1, 1, b'a', 1, 1, b'b', 7, 0, 255, 0, 255, 255, 255, 255, 15, 0,
    ]);
    let file = forged([4, 8, 1, 2, index.len() as u64], &index, &[0; 600]);
    let images = decompressed(&file).unwrap();
    assert_eq!(images, [Err(Damage::Altered), Err(Damage::Cut)]);
    // Another size.
    let index = deflated(&names_only(&[b"a"]));
    let file = forged([8, 4, 1, 1, index.len() as u64], &index, &[0; 99]);
    let refused = decompressed(&file);
    assert!(matches!(refused, Err(CompressError::Damaged(_))));
    // Numbers of more than 32 bits, and an index that is not deflated.
    let file = forged([4, 8, 1, 1, u64::MAX >> 1], &index, &[0; 99]);
    assert!(matches!(open(&file), Err(CompressError::Damaged(_))));
    let file = forged([4, 8, 1, 1, 4], &[0xff; 4], &[0; 99]);
    assert!(matches!(open(&file), Err(CompressError::Damaged(_))));
}

#[test]
fn what_does_not_fit_is_said() {
    let mut pictures = pictures(&["a.png", "b.png"]);
    let file = compressed(&pictures);
    let other = model(2);
    let error = open(&file).unwrap().decompress(&other, &[0], &mut go_on);
    let error = error.unwrap_err().to_string();
    assert!(error.contains(&other.hash().to_string()), "{error}");
    assert!(error.contains(&model(1).hash().to_string()), "{error}");

    let mut newer = file.clone();
    newer[3] = 2;
    assert!(matches!(open(&newer), Err(CompressError::Version(2))));
    assert!(matches!(open(b"\x89PNG\r\n"), Err(CompressError::NotPxc)));
    assert!(matches!(open(b""), Err(CompressError::NotPxc)));

    let stopped = compress(&model(1), &pictures, 1, &mut |_| ControlFlow::Break(()));
    assert!(matches!(
        stopped,
        Err(CompressError::Codec(CodecError::Stopped(_)))
    ));
    let mut archive = open(&file).unwrap();
    let stopped = archive.decompress(&model(1), &[1], &mut |_| ControlFlow::Break(()));
    assert!(matches!(
        stopped,
        Err(CompressError::Codec(CodecError::Stopped(_)))
    ));

    pictures[1].class = 2;
    let refused = compress(&model(1), &pictures, 64, &mut go_on);
    assert!(matches!(
        refused,
        Err(CompressError::Codec(CodecError::Evaluator(_)))
    ));
    pictures[1].levels.pop();
    let refused = compress(&model(1), &pictures, 64, &mut go_on);
    assert!(matches!(
        refused,
        Err(CompressError::Levels { found: 31, .. })
    ));
}

/// Every field of the configuration and every parameter is hashed.
#[test]
fn a_model_has_a_hash_of_its_own() {
    let base = config();
    let mut configs = vec![base.clone(); 14];
    configs[1].height = 8;
    configs[2].width = 4;
    configs[3].channels = 3;
    configs[4].nr_resnet = 2;
    configs[5].nr_filters = 4;
    configs[6].nr_logistic_mix = 3;
    configs[7].nonlinearity = Nonlinearity::Elu;
    configs[8].nr_classes = 0;
    configs[9].nr_channel_resnet = 1;
    configs[10].augmentation = Augmentation::Flips;
    configs[11].augmentation = Augmentation::Symmetries;
    configs[12].attention = [0, 1, 0];
    configs[13].attention = [0, 0, 1];
    let mut hashes: HashSet<_> = configs.iter().map(|c| ModelHash::of(c, &[])).collect();
    assert_eq!(hashes.len(), configs.len());
    let parameters = vec![vec![0.0; 5000], vec![1.0, 2.0]];
    let mut others = vec![parameters; 4];
    others[1][0][4999] = -0.0;
    others[2][1][1] = 2.0f32.next_up();
    others[3][1].swap(0, 1);
    hashes.extend(
        others
            .iter()
            .map(|parameters| ModelHash::of(&base, parameters)),
    );
    assert_eq!(hashes.len(), configs.len() + others.len());
    // Fixed for ever: files name models by it.
    let hash = ModelHash::of(&ModelConfig::default(), &[vec![1.0, -2.5]]);
    assert_eq!(hash.to_string(), "1918e2ca746b4e573c5d1b22dd3f193f");
}

#[test]
fn numbered_names_take_next_to_nothing() {
    for (before, after) in [
        ("0000.png", Some("0001.png")),
        ("a/b0199.x", Some("a/b0200.x")),
        ("99", None),
        ("a9.png", None),
        ("1a9", None),
        ("a", None),
        ("", None),
        ("ü08", Some("ü09")),
        ("x1.mp4", Some("x1.mp5")),
    ] {
        assert_eq!(successor(before).as_deref(), after, "{before}");
    }
    let names: Vec<String> = (0..1000).map(|i| format!("test/{i:04}.png")).collect();
    let (mut index, mut before) = (Vec::new(), "");
    for name in &names {
        write_name(&mut index, before, name);
        before = name;
    }
    assert!(deflated(&index).len() < 40);
}

proptest! {
    #[test]
    fn names_come_back(names in prop::collection::vec("[a-c/]{0,3}[0-9]{0,3}[a-cü]{0,2}", 0..20)) {
        let (mut index, mut before) = (Vec::new(), "");
        for name in &names {
            write_name(&mut index, before, name);
            before = name;
        }
        let (mut fields, mut before) = (Fields(&index), String::new());
        for name in &names {
            before = read_name(&mut fields, &before).unwrap();
            prop_assert_eq!(&before, name);
        }
        prop_assert!(fields.0.is_empty());
    }

    #[test]
    fn numbers_come_back(number: u32, cut in 0usize..5) {
        let mut bytes = Vec::new();
        varint(&mut bytes, number.into());
        prop_assert_eq!(Fields(&bytes).number(), Some(number.into()));
        let cut = cut.min(bytes.len() - 1);
        prop_assert_eq!(Fields(&bytes[..cut]).number(), None);
    }

    #[test]
    fn anything_can_be_opened(mut bytes in prop::collection::vec(any::<u8>(), 0..200), forged: bool) {
        if forged && bytes.len() > 4 {
            bytes[..4].copy_from_slice(b"pxc\x01");
        }
        let _ = open(&bytes);
    }
}

#[test]
fn every_image_has_a_png_file_of_its_own() {
    let long = "x".repeat(255);
    for (names, expected) in [
        (
            &["a.jpg", "b.png", "c"][..],
            &["a.png", "b.png", "c.png"][..],
        ),
        (
            &["a.jpg", "a.png", "a.jpg.png"],
            &["a-2.png", "a.png", "a.jpg.png"],
        ),
        (
            &["a.jpg", "a.webp", "a.gif"],
            &["a.png", "a.webp.png", "a.gif.png"],
        ),
        (&["d/a.PNG", "a.txt"], &["d/a.PNG", "a.txt.png"]),
        // No file can have the name of a folder.
        (&["a.png/b.png", "a.png"], &["a.png/b.png", "a.png.png"]),
        (&[&long, "y"], &[&format!("{}.png", &long[4..]), "y.png"]),
    ] {
        assert_eq!(png_names(names.iter().copied()), expected);
    }
    let many: Vec<String> = (0..300)
        .map(|n| format!("ä{}.{n}", "ö".repeat(125)))
        .collect();
    let files = png_names(many.iter().map(String::as_str));
    assert!(files.iter().all(|file| file.len() <= 255));
    assert_eq!(files.iter().collect::<HashSet<_>>().len(), 300);

    let names = ["a.png", "d/.x", "a.png", "a-2.png", "d/.x", "a.png"];
    assert_eq!(
        distinct_names(names.map(String::from).to_vec()),
        ["a.png", "d/.x", "a-3.png", "a-2.png", "d/.x-2", "a-4.png"]
    );
}

#[test]
fn what_follows_an_archive_is_told() {
    let file = compressed(&pictures(&["a.png", "b.png"]));
    let trailing = |bytes: Vec<u8>| Archive::new(Cursor::new(bytes)).unwrap().trailing();
    assert_eq!(trailing(file.clone()), 0);
    assert_eq!(trailing([&file[..], b"more"].concat()), 4);
    assert_eq!(trailing([&file[..], &file].concat()), file.len() as u64);
    assert_eq!(trailing(file[..file.len() - 1].to_vec()), 0);
}
