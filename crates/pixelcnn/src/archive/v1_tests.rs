//! Version 1: honest files, damaged ones and hostile ones; and the names of both versions.

use std::collections::HashSet;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use pixelcnn_core::codec::{Codec, CodecError};
use pixelcnn_core::incremental::Evaluator;
use pixelcnn_core::kernels::simd;
use proptest::prelude::*;

use super::fields::{Fields, varint};
use super::frame::MAGIC;
use super::names::{read_name, successor, write_name};
use super::*;
#[cfg(feature = "pretrained")]
use crate::Model;
use crate::network::draw_parameters;
use crate::{Augmentation, ModelConfig, Nonlinearity};

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

fn hash(seed: u64) -> ModelHash {
    ModelHash::of(&config(), &draw_parameters(&config(), seed))
}

/// A picture as version 1 had it.
#[derive(Clone)]
struct Picture {
    name: String,
    class: u32,
    levels: Vec<u8>,
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

fn go_on(_: f64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A file as version 1 was written, and where each stream ends.
fn compressed(pictures: &[Picture]) -> (Vec<u8>, Vec<usize>) {
    let codec = Codec {
        evaluator: Evaluator::new(&config(), &draw_parameters(&config(), 1)).unwrap(),
        level: simd::level(),
        threads: 1,
    };
    let labels: Vec<u32> = pictures.iter().map(|picture| picture.class).collect();
    let levels: Vec<u8> = pictures.iter().flat_map(|p| &p.levels).copied().collect();
    let streams = codec.encode(&labels, &levels, &mut |_| ControlFlow::Continue(()));
    let streams = streams.unwrap();
    let (mut index, mut before) = (Vec::new(), "");
    for Picture { name, .. } in pictures {
        write_name(&mut index, before, name);
        before = name;
    }
    for picture in pictures {
        varint(&mut index, picture.class.into());
    }
    index.extend(streams.iter().map(|stream| stream.len() as u8));
    for stream in &streams {
        varint(&mut index, stream.len() as u64 >> 8);
    }
    let index = deflated(&index);
    let sums = pictures.iter().flat_map(|picture| {
        let sum = crc32c::crc32c(&picture.levels).to_le_bytes();
        [sum[0], sum[1], sum[2]]
    });
    let sums: Vec<u8> = sums.collect();
    let numbers = [4, 8, 1, pictures.len() as u64, index.len() as u64];
    let mut file = forged(numbers, &index, &sums);
    let mut ends = Vec::new();
    for stream in streams {
        file.extend(stream);
        ends.push(file.len());
    }
    (file, ends)
}

fn open(file: &[u8]) -> Result<Archive<Cursor<&[u8]>>, ArchiveError> {
    Archive::new(Cursor::new(file))
}

/// The levels of an item: those of a PNG file.
fn levels(found: Result<Found, Damage>) -> Result<Vec<u8>, Damage> {
    let found = found?;
    assert!(found.is_made);
    let image = image::load_from_memory(&found.bytes).unwrap();
    assert_eq!((image.height(), image.width()), (4, 8));
    Ok(image.as_luma8().expect("grey").to_vec())
}

type Images = Vec<Result<Vec<u8>, Damage>>;

fn decompressed(file: &[u8]) -> Result<Images, ArchiveError> {
    let mut archive = open(file)?;
    let all: Vec<usize> = (0..archive.entries().len()).collect();
    let found = archive.read(&model(1), &all, &mut go_on)?;
    Ok(found.into_iter().map(levels).collect())
}

/// A pipe, whose length nobody knows, is listed with a word of what it lacks.
#[test]
fn a_pipe_that_ends_early_is_no_whole_archive() {
    let (file, _) = compressed(&pictures(&["a.png", "b.png"]));
    for (cut, is_whole) in [(0, true), (1, false), (9, false)] {
        let pipe = Pipe::new(&file[..file.len() - cut]);
        let mut reader = Reader::new(pipe).unwrap();
        let mut listed = 0;
        while let Some(block) = reader.next_block().unwrap() {
            listed += block.entries().len();
        }
        assert_eq!((listed, reader.is_whole()), (2, is_whole), "{cut}");
    }
}

/// Whatever was compressed by a shipped model is read without naming it.
#[test]
#[cfg(feature = "pretrained")]
fn a_shipped_model_is_found() {
    for shipped in crate::Shipped::ALL {
        let Model {
            config, weights, ..
        } = shipped.model().unwrap();
        let (file, _) = compressed(&[]);
        let mut head = file[..file.len() - 4].to_vec();
        head[4..20].copy_from_slice(&ModelHash::of(&config, &weights).0);
        head.extend(crc32c::crc32c(&head).to_le_bytes());
        let found = open(&head).unwrap().reader().find_model().unwrap();
        assert!(found.is_some_and(|found| found.weights == weights));
        assert_eq!(open(&file).unwrap().reader().find_model().unwrap(), None);
    }
}

#[test]
fn pictures_come_back_each_without_the_others() {
    for count in [0, 1, 5] {
        let names = &["a/1.png", "a/2.png", "b.jpg", "日本/ü.png", "9"][..count];
        let pictures = pictures(names);
        let (file, _) = compressed(&pictures);
        let mut archive = open(&file).unwrap();
        assert_eq!(archive.reader().model(), hash(1));
        for (i, picture) in pictures.iter().enumerate().rev() {
            let entry = &archive.entries()[i];
            assert_eq!((&entry.name, entry.class), (&picture.name, picture.class));
            assert_eq!((entry.size, entry.levels), (Some([4, 8]), 32));
            assert_eq!(archive.position(&picture.name), Some(i));
            let one = archive.read(&model(1), &[i], &mut go_on).unwrap();
            assert_eq!(levels(one[0].clone()).as_ref(), Ok(&picture.levels));
        }
        assert_eq!(archive.position("c"), None);
        let some = archive.read(&model(1), &[], &mut go_on).unwrap();
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
    let (file, ends) = compressed(&pictures);
    let first = open(&file).unwrap().entries()[0].bytes as usize;
    let start = ends[0] - first;
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
    let mut file = [&MAGIC[..], &[1], &hash(1).0].concat();
    numbers.iter().for_each(|number| varint(&mut file, *number));
    file.extend(index);
    let checksums = (numbers[3] as usize * 3).min(rest.len());
    file.extend(&rest[..checksums]);
    file.extend(crc32c::crc32c(&file).to_le_bytes());
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
        open(&file).map(|archive| archive.entries().to_vec())
    };
    let honest = names_only(&[b"a", b"b"]);
    assert_eq!(forge(2, &honest).unwrap()[1].name, "b");
    let damaged = |count: u64, index: &[u8]| {
        let refused = forge(count, index);
        assert!(
            matches!(refused, Err(ArchiveError::Damaged(_))),
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
            matches!(refused, Err(ArchiveError::Name { .. })),
            "{name}: {refused:?}"
        );
    }
    let twice = forge(2, &names_only(&[b"a", b"a"]));
    assert!(matches!(twice, Err(ArchiveError::Name { .. })));

    // Lengths beyond the file, which only the images notice; a class that the model has not.
    let index = deflated(&[
        1, 1, b'a', 1, 1, b'b', 7, 0, 255, 0, 255, 255, 255, 255, 15, 0,
    ]);
    let file = forged([4, 8, 1, 2, index.len() as u64], &index, &[0; 600]);
    let images = decompressed(&file).unwrap();
    assert_eq!(images, [Err(Damage::Altered), Err(Damage::Altered)]);
    // Another size.
    let index = deflated(&names_only(&[b"a"]));
    let file = forged([8, 4, 1, 1, index.len() as u64], &index, &[0; 99]);
    let refused = decompressed(&file);
    assert!(matches!(refused, Err(ArchiveError::Damaged(_))));
    // Numbers of more than 32 bits, and an index that is not deflated.
    let file = forged([4, 8, 1, 1, u64::MAX >> 1], &index, &[0; 99]);
    assert!(matches!(open(&file), Err(ArchiveError::Damaged(_))));
    let file = forged([4, 8, 1, 1, 4], &[0xff; 4], &[0; 99]);
    assert!(matches!(open(&file), Err(ArchiveError::Damaged(_))));
}

#[test]
fn what_does_not_fit_is_said() {
    let (file, _) = compressed(&pictures(&["a.png", "b.png"]));
    let other = model(2);
    let error = open(&file).unwrap().read(&other, &[0], &mut go_on);
    let error = error.unwrap_err().to_string();
    for hash in [1, 2].map(hash) {
        assert!(error.contains(&hash.to_string()), "{error}");
    }
    assert!(matches!(open(b"\x89PNG\r\n"), Err(ArchiveError::NotPxc)));
    assert!(matches!(open(b""), Err(ArchiveError::NotPxc)));
    let mut archive = open(&file).unwrap();
    let stopped = archive.read(&model(1), &[1], &mut |_| ControlFlow::Break(()));
    assert!(matches!(
        stopped,
        Err(ArchiveError::Codec(CodecError::Stopped(_)))
    ));
}

#[test]
fn many_come_from_a_pipe() {
    let names: Vec<String> = (0..150).map(|number| format!("{number}.png")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let pictures = pictures(&names);
    let (file, _) = compressed(&pictures);
    let mut reader = Reader::new(Pipe::new(&file[..])).unwrap();
    let mut rest = pictures.iter();
    while let Some(block) = reader.next_block().unwrap() {
        let items: Vec<usize> = (0..block.entries().len()).collect();
        for found in reader
            .decode(&block, &items, Some(&model(1)), &mut go_on)
            .unwrap()
        {
            assert_eq!(levels(found).as_ref(), Ok(&rest.next().unwrap().levels));
        }
    }
    assert!(rest.next().is_none() && reader.is_whole());
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
    // Of any size.
    let [narrow, other] = [&configs[2], &configs[3]].map(|c| ModelHash::of_any_size(c, &[]));
    assert!(narrow == ModelHash::of_any_size(&base, &[]) && narrow != other);
    assert!(!hashes.contains(&narrow));
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
fn every_item_has_a_file_of_its_own() {
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
        // Files that are kept, with a colon here, have their own names first.
        (
            &["a.ppm", ":a.png", ":b.jpg"],
            &["a.ppm.png", "a.png", "b.jpg"],
        ),
        (
            &["a/b", ":a", ":c.d/e", ":c.d"],
            &["a/b.png", "a-2", "c.d/e", "c-2.d"],
        ),
    ] {
        let items = names.iter().map(|name| match name.strip_prefix(':') {
            Some(name) => (name, false),
            None => (*name, true),
        });
        assert_eq!(FileNames::default().of(items), expected);
    }
    let many: Vec<String> = (0..300)
        .map(|n| format!("ä{}.{n}", "ö".repeat(125)))
        .collect();
    let files = FileNames::default().of(many.iter().map(|name| (&name[..], true)));
    assert!(files.iter().all(|file| file.len() <= 255));
    assert_eq!(files.iter().collect::<HashSet<_>>().len(), 300);
    // What is cut to the same is numbered in no time.
    let many: Vec<String> = (0..100_000)
        .map(|n| format!("{}{n:06}", "x".repeat(249)))
        .collect();
    let files = FileNames::default().of(many.iter().map(|name| (&name[..], true)));
    assert_eq!(files.iter().collect::<HashSet<_>>().len(), many.len());
    // Some at a time.
    let mut files = FileNames::default();
    assert_eq!(files.of([("a.ppm", true)].into_iter()), ["a.png"]);
    assert_eq!(files.of([("a.png", false)].into_iter()), ["a-2.png"]);

    let names = ["a.png", "d/.x", "a.png", "a-2.png", "d/.x", "a.png"];
    assert_eq!(
        distinct_names(names.map(String::from).to_vec()),
        ["a.png", "d/.x", "a-3.png", "a-2.png", "d/.x-2", "a-4.png"]
    );
}

#[test]
fn what_follows_an_archive_is_told() {
    let (file, _) = compressed(&pictures(&["a.png", "b.png"]));
    let told = |bytes: &[u8]| {
        let reader = Reader::new(Cursor::new(bytes)).unwrap();
        (reader.is_whole(), reader.unknown())
    };
    assert_eq!(told(&file), (true, 0));
    assert_eq!(told(&[&file[..], b"more"].concat()), (true, 4));
    assert_eq!(told(&file.repeat(2)), (true, file.len() as u64));
    assert_eq!(told(&file[..file.len() - 1]), (false, 0));
}
