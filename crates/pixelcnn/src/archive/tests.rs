//! Archives of honest files, of damaged ones and of hostile ones.

use std::io::{Cursor, Read, Write};
use std::ops::ControlFlow;
use std::sync::LazyLock;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use image::{DynamicImage, ImageFormat};
use pixelcnn_core::kernels::simd::Level;
use proptest::prelude::*;

use super::frame::{FRONT, Front};
use super::*;
use crate::network::draw_parameters;
use crate::{Model, ModelConfig};

fn model(config: &ModelConfig) -> CodingModel {
    CodingModel::new(config, &draw_parameters(config, 1)).unwrap()
}

fn small() -> ModelConfig {
    ModelConfig {
        height: 8,
        width: 8,
        nr_resnet: 1,
        nr_filters: 3,
        nr_logistic_mix: 2,
        ..ModelConfig::default()
    }
}

fn go_on(_: f64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Levels of 16 bits as of a photograph: smooth, with some noise.
fn level(x: u32, y: u32, channel: u32) -> u16 {
    let mixed = (x + 1000 * y + 1_000_000 * channel).wrapping_mul(2_654_435_761);
    let noise = ((mixed >> 16) * 13) >> 16;
    let smooth = 90.0 + 60.0 * f64::sin(f64::from(x + 2 * y) / 17.0) + f64::from(channel);
    (smooth * 256.0) as u16 + (noise * 90) as u16
}

fn pixel<const N: usize>(x: u32, y: u32) -> [u16; N] {
    std::array::from_fn(|channel| level(x, y, channel as u32))
}

fn bytes<const N: usize>(x: u32, y: u32) -> [u8; N] {
    pixel(x, y).map(|level| (level >> 8) as u8)
}

/// A picture of each kind of pixels.
fn kinds(width: u32, height: u32) -> Vec<DynamicImage> {
    use image::{
        GrayAlphaImage, GrayImage, ImageBuffer, Luma, LumaA, Rgb, RgbImage, Rgba, RgbaImage,
    };
    vec![
        GrayImage::from_fn(width, height, |x, y| Luma(bytes(x, y))).into(),
        GrayAlphaImage::from_fn(width, height, |x, y| LumaA(bytes(x, y))).into(),
        RgbImage::from_fn(width, height, |x, y| Rgb(bytes(x, y))).into(),
        RgbaImage::from_fn(width, height, |x, y| Rgba(bytes(x, y))).into(),
        ImageBuffer::from_fn(width, height, |x, y| Luma(pixel(x, y))).into(),
        ImageBuffer::from_fn(width, height, |x, y| LumaA(pixel(x, y))).into(),
        ImageBuffer::from_fn(width, height, |x, y| Rgb(pixel(x, y))).into(),
        ImageBuffer::from_fn(width, height, |x, y| Rgba(pixel(x, y))).into(),
    ]
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    image.write_to(&mut file, format).unwrap();
    file.into_inner()
}

/// Without compression, of what PNM knows.
#[cfg(feature = "pretrained")]
fn plain(image: &DynamicImage) -> Option<Vec<u8>> {
    let deep = |samples: &[u16]| samples.iter().flat_map(|s| s.to_be_bytes()).collect();
    let (kind, most, samples): (u8, u32, Vec<u8>) = match image {
        DynamicImage::ImageLuma8(image) => (5, 255, image.to_vec()),
        DynamicImage::ImageRgb8(image) => (6, 255, image.to_vec()),
        DynamicImage::ImageLuma16(image) => (5, 65_535, deep(image)),
        DynamicImage::ImageRgb16(image) => (6, 65_535, deep(image)),
        _ => return None,
    };
    let head = format!("P{kind}\n{} {}\n{most}\n", image.width(), image.height());
    Some([head.as_bytes(), &samples].concat())
}

fn item(name: &str, bytes: Vec<u8>) -> Item {
    Item {
        name: name.into(),
        class: 0,
        bytes,
    }
}

/// In and out again: which items were coded by the model, once all were found to be as they were.
fn round_trip(model: &CodingModel, items: &[Item]) -> Vec<bool> {
    let file = compress(model, items.to_vec(), &mut go_on).unwrap();
    let before: usize = items.iter().map(|item| item.bytes.len()).sum();
    let most = before + 96 + items.iter().map(|item| item.name.len() + 12).sum::<usize>();
    assert!(file.len() <= most, "{} of {before}", file.len());
    // Without vectors a large model would take its time.
    let plain = model.clone().at(Level::Plain);
    for other in [plain].iter().filter(|_| model.config().nr_filters < 8) {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build()
            .unwrap();
        let again = pool.install(|| compress(other, items.to_vec(), &mut go_on).unwrap());
        assert!(again == file);
    }
    let mut archive = Archive::new(Cursor::new(file)).unwrap();
    assert!(archive.reader().is_whole() && archive.reader().unknown() == 0);
    let all: Vec<usize> = (0..items.len()).rev().collect();
    let found = archive.read(model, &all, &mut go_on).unwrap();
    let found = found.into_iter().rev().map(Result::unwrap);
    let found: Vec<Found> = found.collect();
    for ((found, item), entry) in found.iter().zip(items).zip(archive.entries()) {
        assert_eq!(entry.name, item.name);
        if !found.is_made {
            assert!(found.bytes == item.bytes, "{}", item.name);
            continue;
        }
        let [got, want] = [&found.bytes, &item.bytes].map(|b| image::load_from_memory(b).unwrap());
        assert!(got == want, "{}", item.name);
        assert_eq!(
            entry.size,
            Some([want.height() as usize, want.width() as usize])
        );
    }
    // Each alone.
    for (number, want) in found.iter().enumerate() {
        let one = archive.read(model, &[number], &mut go_on).unwrap();
        assert_eq!(one, [Ok(want.clone())]);
    }
    found.iter().map(|found| found.is_made).collect()
}

#[test]
#[cfg(feature = "pretrained")]
fn pictures_of_every_kind_come_back() {
    let shipped = crate::Model::pretrained().unwrap();
    let model = CodingModel::new(&shipped.config, &shipped.weights).unwrap();
    let mut items = Vec::new();
    for (number, image) in kinds(66, 20).iter().enumerate() {
        items.push(item(
            &format!("{number}.png"),
            encoded(image, ImageFormat::Png),
        ));
        if let Some(file) = plain(image) {
            items.push(item(&format!("{number}.pnm"), file));
        }
        for (name, format) in [("webp", ImageFormat::WebP), ("qoi", ImageFormat::Qoi)] {
            if number == 2 || number == 3 {
                items.push(item(&format!("{number}.{name}"), encoded(image, format)));
            }
        }
        if number == 2 {
            items.push(item("2.bmp", encoded(image, ImageFormat::Bmp)));
        }
    }
    for (number, size) in [[1, 1], [300, 3], [2, 65]].into_iter().enumerate() {
        let file = plain(&kinds(size[0], size[1])[2]).unwrap();
        items.push(item(&format!("small/{number}.ppm"), file));
    }
    let coded = round_trip(&model, &items);
    // Those of 8 bits without compression at least, and of PNGs that of colours.
    for name in [
        "0.pnm",
        "2.pnm",
        "0.png",
        "2.png",
        "3.png",
        "small/1.ppm",
        "2.webp",
        "3.webp",
        "2.qoi",
        "3.qoi",
        "2.bmp",
    ] {
        let number = items.iter().position(|item| item.name == name).unwrap();
        assert!(coded[number], "{name}");
    }
}

#[test]
fn what_is_no_picture_is_kept_as_it_is() {
    let rgb = &kinds(20, 9)[2];
    let mut cut = encoded(rgb, ImageFormat::Png);
    cut.truncate(60);
    let items = [
        item("notes.txt", b"not a picture".to_vec()),
        item("nothing", Vec::new()),
        item("photo.jpg", encoded(rgb, ImageFormat::Jpeg)),
        item("cut.png", cut),
        item(
            "more.png",
            [encoded(rgb, ImageFormat::Png), vec![7; 9]].concat(),
        ),
        item("dir/photo.png", encoded(rgb, ImageFormat::Png)),
        // Of these a PNG could not hold all: other levels, a comment, tags, a second picture, no pixels.
        item("ten.pgm", b"P2 2 1 1023 7 1000".to_vec()),
        item("comment.pgm", b"P2 2 1 #c\n255 7 100".to_vec()),
        item("tags.tif", encoded(rgb, ImageFormat::Tiff)),
        item("two.pgm", b"P5 1 1 255 aP5 1 1 255 b".to_vec()),
        item("empty.ppm", b"P6\n0 0\n255\n".to_vec()),
        item(
            "more.bmp",
            [encoded(rgb, ImageFormat::Bmp), vec![7]].concat(),
        ),
        item(
            "more.qoi",
            [encoded(rgb, ImageFormat::Qoi), vec![7]].concat(),
        ),
    ];
    assert_eq!(round_trip(&model(&small()), &items), [false; 13]);
    assert!(round_trip(&model(&small()), &[]).is_empty());
}

/// Of formats that say each level in letters, any model's are smaller.
fn in_letters(width: usize, height: usize, seed: usize) -> Vec<u8> {
    let mut file = format!("P3\n{width} {height}\n255\n");
    for i in 0..3 * width * height {
        file += &format!("{} ", 100 + (i * (seed + 3) + i * i / 7) % 150);
    }
    file.into_bytes()
}

#[test]
fn models_of_every_kind_code() {
    let configs = [
        small(),
        ModelConfig {
            channels: 1,
            ..small()
        },
        ModelConfig {
            nr_filters: 4,
            attention: [0, 2, 1],
            ..small()
        },
        ModelConfig {
            nr_channel_resnet: 1,
            nr_classes: 2,
            ..small()
        },
    ];
    for config in configs {
        let grey = "P2\n5 70\n255\n".to_owned() + &"200 201 ".repeat(175);
        let mut items = vec![
            item("a.ppm", in_letters(11, 6, 1)),
            item("b.pgm", grey.into_bytes()),
            item("c.ppm", in_letters(70, 70, 2)),
            item("c.txt", b"between".to_vec()),
        ];
        items[2].class = 1;
        assert_eq!(
            round_trip(&model(&config), &items),
            [true, true, true, false]
        );
    }
}

/// What a PNG says beside its pixels.
#[test]
#[cfg(feature = "pretrained")]
fn profiles_gamma_orientation_and_texts_come_back() {
    let shipped = crate::Model::pretrained().unwrap();
    let model = CodingModel::new(&shipped.config, &shipped.weights).unwrap();
    let image = &kinds(80, 60)[2];
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 80, 60);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_source_gamma(png::ScaledFloat::new(1.0));
    encoder
        .add_text_chunk("Author".into(), "me".into())
        .unwrap();
    encoder.set_pixel_dims(Some(png::PixelDimensions {
        xppu: 300,
        yppu: 200,
        unit: png::Unit::Meter,
    }));
    let mut writer = encoder.write_header().unwrap();
    let exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    writer
        .write_chunk(png::chunk::ChunkType(*b"eXIf"), exif)
        .unwrap();
    writer.write_image_data(image.as_bytes()).unwrap();
    drop(writer);
    let items = [item("a.png", file)];
    assert_eq!(round_trip(&model, &items), [true]);
    let archive = compress(&model, items.to_vec(), &mut go_on).unwrap();
    let mut archive = Archive::new(Cursor::new(archive)).unwrap();
    let [Ok(Found { bytes, .. })] = &archive.read(&model, &[0], &mut go_on).unwrap()[..] else {
        panic!("lost");
    };
    let decoder = png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
    let info = decoder.info();
    assert_eq!(info.gama_chunk, Some(png::ScaledFloat::new(1.0)));
    assert_eq!(info.uncompressed_latin1_text[0].text, "me");
    assert_eq!(info.pixel_dims.unwrap().xppu, 300);
    assert_eq!(info.exif_metadata.as_deref(), Some(&exif[..]));
}

/// An archive of two blocks, with what is in it.
static TWO_BLOCKS: LazyLock<(CodingModel, Vec<Item>, Vec<u8>)> = LazyLock::new(|| {
    let model = model(&small());
    let items: Vec<Item> = (0..100)
        .map(|number| match number % 10 {
            9 => item(&format!("{number}.txt"), vec![number as u8; 5]),
            _ => item(&format!("{number}.ppm"), in_letters(3, 2, number)),
        })
        .collect();
    let file = compress(&model, items.clone(), &mut go_on).unwrap();
    (model, items, file)
});

/// What comes back of a file that may be damaged: never another picture than there was.
fn survivors(model: &CodingModel, items: &[Item], file: &[u8]) -> Option<usize> {
    let mut archive = Archive::new(Cursor::new(file)).ok()?;
    let all: Vec<usize> = (0..archive.entries().len()).collect();
    let found = archive.read(model, &all, &mut go_on).unwrap();
    let mut whole = 0;
    for (entry, found) in archive.entries().iter().zip(found) {
        let Ok(found) = found else {
            continue;
        };
        let item = items.iter().find(|item| item.name == entry.name).unwrap();
        match found.is_made {
            false => assert!(found.bytes == item.bytes),
            true => {
                let [got, want] =
                    [&found.bytes, &item.bytes].map(|b| image::load_from_memory(b).unwrap());
                assert!(got == want, "{}", entry.name);
            }
        }
        whole += 1;
    }
    assert!(!archive.reader().is_whole() || all.len() == items.len());
    Some(whole)
}

#[test]
fn what_is_whole_comes_back_from_a_damaged_file() {
    let (model, items, file) = &*TWO_BLOCKS;
    assert_eq!(survivors(model, items, file), Some(100));
    let [_, second, _] = starts(file)[..] else {
        panic!("two blocks and the end");
    };
    let mut reader = Reader::new(Cursor::new(&file[..])).unwrap();
    reader.next_block().unwrap().unwrap();
    let of_second = reader.next_block().unwrap().unwrap().entries().len();
    // Cut, what lies before is there.
    let mut before = 0;
    for at in (0..file.len()).step_by(7) {
        let whole = survivors(model, items, &file[..at]).unwrap_or(0);
        assert!(whole >= before, "{at}");
        before = whole;
        if at > second {
            assert!(whole >= 100 - of_second);
        }
    }
    assert!(before >= 99);
    // Where the first block's head is damaged, the second is found; a stream is one item's.
    for at in (0..file.len()).step_by(3) {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at % 8);
        let whole = survivors(model, items, &flipped);
        match whole {
            None => assert!(at < 4, "{at}"),
            Some(whole) => assert!(whole >= of_second.min(100 - of_second), "{at}: {whole}"),
        }
    }
    // Something between the blocks, and behind all.
    let spliced = [
        &file[..second],
        b"pxcB and more pxcE",
        &file[second..],
        b"tail",
    ]
    .concat();
    assert_eq!(survivors(model, items, &spliced), Some(100));
    let told = |file: &[u8]| {
        let mut archive = Archive::new(Cursor::new(file)).unwrap();
        (archive.reader().is_whole(), archive.reader().unknown())
    };
    assert_eq!(told(&spliced), (false, 22));
    assert_eq!(told(&[&file[..], b"tail"].concat()), (true, 4));
    // Where bytes of a block are missing, the next one begins earlier.
    for lost in [1, 20, 300] {
        let mut short = file.clone();
        short.drain(second - 300..second - 300 + lost);
        let whole = survivors(model, items, &short).unwrap();
        assert!(whole >= of_second + 50, "{lost}: {whole}");
    }
    // The end tells once more what the front does.
    for at in 4..FRONT {
        let mut flipped = file.clone();
        flipped[at] ^= 16;
        assert_eq!(survivors(model, items, &flipped), Some(100), "{at}");
        assert!(!told(&flipped).0);
        let mut cut = flipped[..file.len() - 1].to_vec();
        cut[at] ^= 1;
        assert!(Archive::new(Cursor::new(&cut[..])).is_err());
    }
    // A block that is there twice is one.
    let twice = [&file[..second], &file[FRONT..second], &file[second..]].concat();
    assert_eq!(survivors(model, items, &twice), Some(100));
    assert_eq!(told(&twice), (false, (second - FRONT) as u64));
    // One whose index is damaged is passed over.
    let mut flipped = file.clone();
    flipped[second + 40] ^= 1;
    let end = starts(file)[2];
    assert_eq!(told(&flipped), (false, (end - second) as u64));
    assert_eq!(told(&file[..second + 40]), (false, 40));
}

#[test]
fn blocks_that_lie_are_passed_over() {
    let model = model(&small());
    let front = Front {
        hash: model.hash(),
        id: 7,
        channels: 3,
    };
    let part = |name: &str, picture: Option<index::Picture>, lengths: Vec<u64>| index::Part {
        name: name.into(),
        picture,
        sum: index::Sum::of(b""),
        lengths,
    };
    let wide = |height, width| {
        Some(index::Picture {
            height,
            width,
            class: 0,
            kind: exact::Kind {
                colour: true,
                alpha: true,
                deep: true,
            },
            chunks: Vec::new(),
        })
    };
    let found = |columns, parts: &[index::Part], streams: usize| {
        let cutting = model::Cutting {
            columns,
            channels: 3,
            adapts: true,
        };
        let written = index::write(cutting, parts);
        let mut index = Vec::new();
        fields::varint(&mut index, written.len() as u64);
        index.extend(written);
        let index = front.summed(index);
        let start = front.start(frame::Kind::Items, index.len() + streams);
        let file = [
            front.write(),
            start,
            index,
            vec![0; streams],
            front.end(parts.len()),
        ]
        .concat();
        let archive = Archive::new(Cursor::new(file)).unwrap();
        archive.entries().len()
    };
    assert_eq!(found(Some(64), &[part("a", None, vec![3])], 3), 1);
    // Other columns than any that are written.
    for columns in [1, 63, 128, 192, 256, 512] {
        let nothing = found(Some(columns), &[part("a", None, vec![3])], 3);
        assert_eq!(nothing, 0, "{columns}");
    }
    assert_eq!(
        found(Some(64), &[part("a", wide(64, 64), vec![0; 4])], 0),
        1
    );
    // Names that lead elsewhere.
    let long = "a/".repeat(2048) + "b";
    for name in [
        "",
        "/a",
        "a/../b",
        "..",
        ".",
        "a//b",
        "a/",
        "./a",
        "a\nb",
        "a\0",
        &"x".repeat(256),
        &long,
    ] {
        assert_eq!(
            found(Some(64), &[part(name, None, vec![3])], 3),
            0,
            "{name}"
        );
        let item = item(name, vec![1]);
        assert!(matches!(
            compress(&model, vec![item], &mut go_on),
            Err(ArchiveError::Name { .. })
        ));
    }
    // More or fewer streams than there are bytes, strips that are too narrow, sides that are too long.
    assert_eq!(found(Some(64), &[part("a", None, vec![4])], 3), 0);
    assert_eq!(
        found(
            Some(64),
            &[part("a", None, vec![u64::from(u32::MAX) << 8])],
            3
        ),
        0
    );
    assert_eq!(
        found(Some(32), &[part("a", wide(64, 64), vec![0; 8])], 0),
        0
    );
    assert_eq!(
        found(Some(64), &[part("a", wide(20_000, 1), vec![0; 4 * 313])], 0),
        0
    );
    assert_eq!(
        found(None, &[part("a", wide(1024, 1024), vec![0; 4])], 0),
        0
    );
    // Two of 268 million pixels.
    let huge = part("a", wide(16_384, 16_384), vec![0; 4 << 16]);
    let other = part("b", wide(16_384, 16_384), vec![0; 4 << 16]);
    assert_eq!(found(Some(64), std::slice::from_ref(&huge), 0), 1);
    assert_eq!(found(Some(64), &[huge, other], 0), 0);
}

/// Where blocks seem to begin.
fn starts(file: &[u8]) -> Vec<usize> {
    let starts = file.windows(4).enumerate();
    starts
        .filter(|(_, bytes)| bytes == b"pxcB")
        .map(|(at, _)| at)
        .collect()
}

#[test]
fn an_archive_in_an_archive_is_a_file() {
    let (model, items, inner) = &*TWO_BLOCKS;
    let outer = [
        item("first", vec![1]),
        item("inner.pxc", inner.clone()),
        item("last", vec![2]),
    ];
    let file = compress(model, outer.to_vec(), &mut go_on).unwrap();
    assert_eq!(starts(&file).len(), 2 + 3);
    let names = |file: &[u8]| {
        let archive = Archive::new(Cursor::new(file)).unwrap();
        archive
            .entries()
            .iter()
            .map(|entry| entry.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&file), ["first", "inner.pxc", "last"]);
    // However damaged it is, nothing of the inner one is taken for its own.
    for at in FRONT..64 {
        let mut damaged = file.clone();
        damaged[at] ^= 1;
        let names = names(&damaged);
        assert!(
            names.is_empty() || names == ["first", "inner.pxc", "last"],
            "{at}: {names:?}"
        );
    }
    let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
    let found = archive.read(model, &[1], &mut go_on).unwrap();
    let found = found[0].as_ref().unwrap();
    assert_eq!(survivors(model, items, &found.bytes), Some(100));
}

#[test]
fn what_newer_programs_write_is_passed_over() {
    let (model, items, file) = &*TWO_BLOCKS;
    let front = Front::read(file[..FRONT].try_into().unwrap()).unwrap();
    let mut start = [b"pxcB", &[9, 5][..]].concat();
    start.extend(crc32c::crc32c_append(front.id, &start).to_le_bytes());
    let newer = [&file[..FRONT], &start, b"pxcB?", &file[FRONT..]].concat();
    assert_eq!(survivors(model, items, &newer), Some(100));
    let mut archive = Archive::new(Cursor::new(&newer[..])).unwrap();
    assert!(archive.reader().is_whole());
    assert_eq!(
        (archive.reader().newer(), archive.reader().unknown()),
        (1, 0)
    );
}

/// Counts what is read of it.
struct Counted<'a>(&'a [u8], &'a std::cell::Cell<usize>);

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.set(self.1.get() + count);
        Ok(count)
    }
}

#[test]
fn a_pipe_is_decoded_while_the_rest_is_on_its_way() {
    let model = model(&small());
    let mut items = vec![
        item("large.ppm", in_letters(200, 300, 3)),
        item("a.txt", vec![7; 9]),
    ];
    let mut file = compress(&model, items.clone(), &mut go_on).unwrap();
    let read = std::cell::Cell::new(0);
    let mut first = None;
    let mut progress = |_| {
        first.get_or_insert(read.get());
        ControlFlow::Continue(())
    };
    let mut reader = Reader::new(Pipe::new(Counted(&file, &read))).unwrap();
    let block = reader.next_block().unwrap().unwrap();
    let found = reader
        .decode(&block, &[0, 1], Some(&model), &mut progress)
        .unwrap();
    for (found, item) in found.iter().zip(&items) {
        assert!(found.as_ref().unwrap().is_of(&item.bytes));
    }
    assert!(reader.next_block().unwrap().is_none() && reader.is_whole());
    assert_eq!(read.get(), file.len());
    // The first row needs the first tile alone, of 20.
    assert!(
        first.unwrap() < file.len() / 8,
        "{first:?} of {}",
        file.len()
    );

    // Blocks that nobody wants are passed over; whatever lies between is too.
    let (_, many, two) = &*TWO_BLOCKS;
    let second = starts(two)[1];
    file = [&two[..second], b"pxcB and so on", &two[second..]].concat();
    items = many.clone();
    let mut reader = Reader::new(Pipe::new(&file[..])).unwrap();
    let first = reader.next_block().unwrap().unwrap();
    let block = reader.next_block().unwrap().unwrap();
    let found = reader
        .decode(&block, &[0], Some(&TWO_BLOCKS.0), &mut go_on)
        .unwrap();
    let number = first.entries().len();
    assert!(found[0].as_ref().unwrap().is_of(&items[number].bytes));
    assert!(reader.next_block().unwrap().is_none() && !reader.is_whole());
    assert_eq!(reader.unknown(), 14);
}

#[test]
fn a_model_travels_with_what_it_coded() {
    let mut config = small();
    for exact_in_half in [true, false] {
        let mut weights = draw_parameters(&config, 3);
        if exact_in_half {
            weights = crate::weights::hub::rounded_to_half(&config, &weights).unwrap();
        }
        let model = Model {
            config: config.clone(),
            weights,
            card: card(),
        };
        let coder = model.coder().unwrap();
        let mut writer = Writer::new(&coder, Vec::new()).embed(&model).unwrap();
        let mut grouping = Grouping::new(&coder);
        let picture = item("a.ppm", in_letters(9, 5, 1));
        assert!(grouping.push(picture.clone()).is_none());
        let group = grouping.finish().unwrap();
        writer
            .write(&group.encode(&coder, &mut go_on).unwrap())
            .unwrap();
        let (file, len) = writer.finish().unwrap();
        assert_eq!(file.len() as u64, len);
        let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
        let taken = archive.reader().embedded().unwrap().unwrap();
        assert_eq!(taken.weights, model.weights);
        assert_eq!(archive.reader().find_model().unwrap(), Some(taken.clone()));
        let found = archive
            .read(&taken.coder().unwrap(), &[0], &mut go_on)
            .unwrap();
        assert!(found[0].as_ref().unwrap().is_of(&picture.bytes));
        // Damaged it is told; the pictures are there for whoever has it.
        let mut damaged = file.clone();
        damaged[200] ^= 4;
        let mut archive = Archive::new(Cursor::new(&damaged[..])).unwrap();
        assert!(matches!(
            archive.reader().embedded(),
            Err(ArchiveError::Damaged(_))
        ));
        assert_eq!(archive.read(&coder, &[0], &mut go_on).unwrap(), found);
        assert!(archive.reader().find_model().is_err());
        config.nr_filters += 1;
        let other = CodingModel::new(&config, &draw_parameters(&config, 1)).unwrap();
        let refused = Writer::new(&other, Vec::new()).embed(&model);
        assert!(matches!(refused, Err(ArchiveError::WrongModel { .. })));
    }
}

fn card() -> crate::weights::hub::Card {
    crate::weights::hub::Card {
        name: "small".into(),
        averaged: true,
        precision: crate::weights::safetensors::Precision::Single,
        step: 1,
        images_seen: 1,
        seconds: 1.0,
        data: "none".into(),
        origin: None,
        class_names: Vec::new(),
        measured: None,
    }
}

/// Where the model in an archive is damaged, the library may have it.
#[test]
#[cfg(feature = "pretrained")]
fn a_shipped_model_takes_the_place_of_a_damaged_one() {
    for shipped in crate::Shipped::ALL {
        let model = shipped.model().unwrap();
        let coder = model.coder().unwrap();
        let mut writer = Writer::new(&coder, Vec::new()).embed(&model).unwrap();
        let mut grouping = Grouping::new(&coder);
        assert!(grouping.push(item("a.ppm", in_letters(9, 5, 1))).is_none());
        let group = grouping.finish().unwrap();
        writer
            .write(&group.encode(&coder, &mut go_on).unwrap())
            .unwrap();
        let (mut file, _) = writer.finish().unwrap();
        file[5000] ^= 4;
        let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
        assert!(archive.reader().embedded().is_err());
        assert_eq!(archive.reader().find_model().unwrap(), Some(model));
    }
}

/// Ten thousand files that were cut, flipped and spliced.
#[test]
fn damage_of_every_kind_is_survived() {
    let model = model(&small());
    let items: Vec<Item> = (0..8)
        .map(|number| match number % 4 {
            3 => item(&format!("{number}.txt"), vec![number as u8; 5]),
            _ => item(&format!("{number}.ppm"), in_letters(5, 3, number)),
        })
        .collect();
    let mut writer = Writer::new(&model, Vec::new());
    for items in items.chunks(3) {
        let mut grouping = Grouping::new(&model);
        for item in items {
            assert!(grouping.push(item.clone()).is_none());
        }
        let group = grouping.finish().unwrap();
        writer
            .write(&group.encode(&model, &mut go_on).unwrap())
            .unwrap();
    }
    let (whole, _) = writer.finish().unwrap();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    let mut all = 0;
    for _ in 0..10_000 {
        let mut file = whole.clone();
        for _ in 0..=random(3) {
            let (at, to) = (random(file.len()), random(file.len()));
            match random(4) {
                0 => file.truncate(at),
                1 if at < file.len() => file[at] ^= 1 << random(8),
                2 => drop(file.drain(at.min(to)..at.max(to))),
                _ => {
                    let part = whole[random(whole.len())..].to_vec();
                    let part = &part[..random(part.len().min(200))];
                    file.splice(at..at, part.iter().copied());
                }
            }
        }
        all += survivors(&model, &items, &file).unwrap_or(0);
    }
    // Of most something is left.
    assert!(all > 20_000, "{all}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// However a file is mixed up, nothing panics and no other picture comes out.
    #[test]
    fn mixed_up_files_are_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
    ) {
        let (model, items, mut file) = TWO_BLOCKS.clone();
        for (place, value, how) in changes {
            let at = place.index(file.len().max(1));
            match how {
                0 if at < file.len() => file[at] ^= value,
                1 => file.truncate(at),
                2 => {
                    let moved = file.split_off(at);
                    file.splice(at / 2..at / 2, moved);
                }
                _ => file.insert(at, value),
            }
            if file.is_empty() {
                file.push(0);
            }
        }
        survivors(&model, &items, &file);
    }

    #[test]
    fn anything_can_be_opened(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let model = model(&small());
        let front = Front { hash: model.hash(), id: 7, channels: 3 };
        let opened = |start: &[u8]| {
            let file = [&front.write()[..], start, &bytes].concat();
            survivors(&model, &[], &file);
            survivors(&model, &[], &file[file.len() / 2..]);
            let mut piped = Reader::new(Pipe::new(&file[..])).unwrap();
            while piped.next_block().unwrap().is_some() {}
        };
        opened(b"");
        opened(b"pxcB");
        for kind in [frame::Kind::Items, frame::Kind::Model, frame::Kind::End] {
            opened(&front.start(kind, bytes.len()));
            // An index whose sum is right, whatever it says.
            let mut index = vec![bytes.len() as u8 & 0x7f];
            index.extend(&bytes[..bytes.len() & 0x7f]);
            let index = front.summed(index);
            opened(&[front.start(kind, index.len() + bytes.len()), index].concat());
            // And one whose head is inflated.
            let mut deflated = DeflateEncoder::new(vec![2, 8, 0, 0, 0, 0, 0, 0, 0, 0], Compression::fast());
            deflated.write_all(&bytes).unwrap();
            let deflated = deflated.finish().unwrap();
            let mut index = Vec::new();
            fields::varint(&mut index, deflated.len() as u64);
            index.extend(deflated);
            let index = front.summed(index);
            opened(&[front.start(kind, index.len() + bytes.len()), index].concat());
        }
    }
}

#[test]
fn what_does_not_fit_is_said() {
    let (model_, _, file) = &*TWO_BLOCKS;
    let other = CodingModel::new(&small(), &draw_parameters(&small(), 2)).unwrap();
    let mut archive = Archive::new(Cursor::new(&file[..])).unwrap();
    let error = archive.read(&other, &[0], &mut go_on).unwrap_err();
    assert!(matches!(error, ArchiveError::WrongModel { .. }), "{error}");
    let stopped = archive.read(model_, &[0], &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(ArchiveError::Codec(_))));
    for names in [&["a", "a"][..], &["../a"], &["/a"], &["a\nb"]] {
        let items = names.iter().map(|name| item(name, vec![1])).collect();
        let error = compress(model_, items, &mut go_on).unwrap_err();
        assert!(matches!(error, ArchiveError::Name { .. }), "{error}");
    }
    for (bytes, part) in [
        (&file[..10], "cut off in its front"),
        (&b"PNG"[..], "not a .pxc file"),
        (&[b"pxc\x03", &file[4..]].concat()[..], "version 3"),
        (
            &[&file[..9], &[!file[9]], &file[10..90]].concat()[..],
            "front was altered",
        ),
    ] {
        let error = Archive::new(Cursor::new(bytes)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
