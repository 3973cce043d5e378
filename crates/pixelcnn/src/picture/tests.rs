//! Picture files of every format, whole, damaged and hostile.

use std::io::{Cursor, Write};

use image::codecs::gif::GifEncoder;
use image::{
    Delay, Frame, GrayImage, ImageBuffer, ImageEncoder, ImageFormat, Luma, Rgb, RgbImage, Rgba,
    RgbaImage,
};
use proptest::prelude::*;

use super::*;
use crate::picture::file::{header, is_surely_whole};

const SIZE: [usize; 2] = [6, 8];

fn picture() -> RgbImage {
    RgbImage::from_fn(8, 6, |x, y| {
        Rgb([30 * x as u8, 40 * y as u8, (x * y) as u8])
    })
}

fn encode(image: impl Into<image::DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

const EVERY: [(ImageFormat, &str); 8] = [
    (ImageFormat::Png, "a.png"),
    (ImageFormat::Jpeg, "a.JPE"),
    (ImageFormat::WebP, "a.webp"),
    (ImageFormat::Gif, "a.gif"),
    (ImageFormat::Bmp, "a.bmp"),
    (ImageFormat::Tiff, "a.tif"),
    (ImageFormat::Pnm, "a.ppm"),
    (ImageFormat::Qoi, "a.qoi"),
];

fn decode(bytes: &[u8], channels: usize, fit: Fit) -> Result<Vec<u8>, Unread> {
    file::decode(bytes, channels, fit).map(|decoded| decoded.levels)
}

fn read_levels(bytes: &[u8], channels: usize) -> Vec<u8> {
    decode(bytes, channels, Fit::Exact(SIZE)).unwrap()
}

#[test]
fn every_format_is_read() {
    let folder = tempfile::tempdir().unwrap();
    for (format, name) in EVERY {
        assert!(is_picture(Path::new(name)), "{name}");
        let bytes = encode(picture(), format);
        let path = folder.path().join(name);
        std::fs::write(&path, &bytes).unwrap();
        let read = super::read(&path, [6, 8, 3]).unwrap();
        // JPEG's own pixels, whatever they are.
        let shown = image::load_from_memory(&bytes).unwrap().into_rgb8();
        assert_eq!(read.levels, shown.into_raw(), "{name}");
        if !matches!(format, ImageFormat::Jpeg | ImageFormat::Gif) {
            assert_eq!(read.levels, picture().into_raw(), "{name}");
        }
        assert_eq!(read.dropped, Dropped::default(), "{name}");
        let found = header(&bytes, true).unwrap();
        assert_eq!(([found.height, found.width], found.grey), (SIZE, false));
        let wrong = super::read(&path, [8, 6, 3]).unwrap_err();
        assert_eq!(
            wrong.to_string(),
            format!(
                "{}: 8x6 pixels where 6x8 are wanted: crop or resize it first",
                path.display()
            )
        );
    }
    for name in [
        "a.jpg", "a.jpeg", "a.jfif", "a.dib", "a.tiff", "a.pgm", "a.PNG",
    ] {
        assert!(is_picture(Path::new(name)), "{name}");
    }
    for name in ["a.txt", "png", "a.heic", "a.svg", "a.png.txt"] {
        assert!(!is_picture(Path::new(name)), "{name}");
    }
}

/// A file that ends early is refused, or loses nothing: never is a part made up.
#[test]
fn files_that_are_cut_off_are_noticed() {
    for (format, name) in EVERY {
        let bytes = encode(picture(), format);
        let whole = decode(&bytes, 3, Fit::Exact(SIZE)).unwrap();
        for len in 0..bytes.len() {
            let cut = &bytes[..len];
            if let Ok(levels) = decode(cut, 3, Fit::Exact(SIZE)) {
                assert!(levels == whole, "{name}: {len} of {} bytes", bytes.len());
            }
            let last = &cut[len.saturating_sub(16)..];
            assert!(
                !is_surely_whole(cut, last, len as u64)
                    || decode(cut, 3, Fit::Exact(SIZE)).as_ref() == Ok(&whole),
                "{name}: {len}"
            );
        }
    }
}

#[test]
fn what_pixels_leave_out_is_told() {
    let dropped = |bytes: &[u8]| header(bytes, true).unwrap().dropped;
    let clear = RgbaImage::from_pixel(8, 6, Rgba([1, 2, 3, 0]));
    let opaque = RgbaImage::from_pixel(8, 6, Rgba([1, 2, 3, 255]));
    for format in [
        ImageFormat::Png,
        ImageFormat::WebP,
        ImageFormat::Tiff,
        ImageFormat::Qoi,
        ImageFormat::Gif,
    ] {
        let bytes = encode(clear.clone(), format);
        assert!(dropped(&bytes).alpha, "{format:?}");
        let bytes = encode(opaque.clone(), format);
        assert_eq!(read_levels(&bytes, 3)[..3], [1, 2, 3], "{format:?}");
    }
    for format in [ImageFormat::Png, ImageFormat::Tiff] {
        let deep = ImageBuffer::from_pixel(8, 6, Rgb([0x1234u16, 0, 0]));
        let bytes = encode(deep, format);
        assert!(dropped(&bytes).depth && !dropped(&bytes).alpha);
    }
    let grey = encode(GrayImage::from_pixel(8, 6, Luma([9])), ImageFormat::Png);
    assert_eq!(read_levels(&grey, 1), [9; 48]);
    // A format without grey can hold a grey picture all the same.
    let grey = encode(RgbImage::from_pixel(8, 6, Rgb([9; 3])), ImageFormat::Bmp);
    assert_eq!(read_levels(&grey, 1), [9; 48]);

    let mut count = DroppedCount::default();
    assert!(count.is_empty());
    for (alpha, depth) in [(true, false), (true, true), (false, false)] {
        count += Dropped {
            alpha,
            depth,
            ..Dropped::default()
        };
    }
    assert_eq!(
        count.to_string(),
        "2 of 3 pictures have an alpha channel, 1 has more than 8 bits a channel"
    );
}

/// A PNG with chunks before its data.
fn png_with(chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let mut bytes = encode(picture(), ImageFormat::Png);
    let mut at = 33; // behind the header
    for (name, data) in chunks {
        let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
        let named = [&name[..], data].concat();
        let mut crc = flate2::Crc::new();
        crc.update(&named);
        chunk.extend(&named);
        chunk.extend(crc.sum().to_be_bytes());
        bytes.splice(at..at, chunk.iter().copied());
        at += chunk.len();
    }
    bytes
}

#[test]
fn profiles_and_metadata_are_found() {
    let found = |bytes: &[u8]| {
        let beside = file::beside_pixels(bytes).unwrap();
        (beside.profile, beside.metadata)
    };
    let mut profile = Vec::new();
    let mut deflated = flate2::write::ZlibEncoder::new(&mut profile, Default::default());
    deflated.write_all(b"a profile").unwrap();
    deflated.finish().unwrap();
    let iccp = [&b"name\0\0"[..], &profile].concat();
    let srgb_primaries: Vec<u8> = [31270u32, 32900, 64000, 33000, 30000, 60000, 15000, 6000]
        .iter()
        .flat_map(|n| n.to_be_bytes())
        .collect();
    let mut wide = srgb_primaries.clone();
    wide[8..12].copy_from_slice(&68_000u32.to_be_bytes());
    for (chunks, expected) in [
        (&[][..], (false, false)),
        (&[(b"iCCP", &iccp[..])], (true, false)),
        (&[(b"gAMA", &100_000u32.to_be_bytes())], (true, false)),
        (&[(b"gAMA", &45_455u32.to_be_bytes())], (false, false)),
        (
            &[(b"sRGB", &[0]), (b"gAMA", &45_455u32.to_be_bytes())],
            (false, false),
        ),
        (&[(b"cHRM", &srgb_primaries)], (false, false)),
        (&[(b"cHRM", &wide)], (true, false)),
        (&[(b"tEXt", b"Author\0me")], (false, true)),
        (&[(b"eXIf", b"II*\0\x08\0\0\0\0\0\0\0\0\0")], (false, true)),
    ] {
        assert_eq!(found(&png_with(chunks)), expected, "{chunks:?}");
    }
    let mut photo = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new(&mut photo);
    encoder.set_icc_profile(vec![1; 200]).unwrap();
    encoder.encode_image(&picture()).unwrap();
    assert_eq!(found(&photo), (true, false));
}

#[test]
fn more_than_one_picture_in_a_file_is_refused() {
    let two = [picture(), RgbImage::new(8, 6)];
    let mut gif = Vec::new();
    {
        let mut encoder = GifEncoder::new(&mut gif);
        for image in &two {
            let frame = image::DynamicImage::from(image.clone()).into_rgba8();
            let delay = Delay::from_numer_denom_ms(100, 1);
            encoder
                .encode_frame(Frame::from_parts(frame, 0, 0, delay))
                .unwrap();
        }
    }
    let mut apng = Vec::new();
    {
        let mut encoder = png::Encoder::new(&mut apng, 8, 6);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_animated(2, 0).unwrap();
        let mut writer = encoder.write_header().unwrap();
        for image in &two {
            writer.write_image_data(image).unwrap();
        }
    }
    let mut tiff = Cursor::new(Vec::new());
    {
        let mut encoder = tiff::encoder::TiffEncoder::new(&mut tiff).unwrap();
        for image in &two {
            encoder
                .write_image::<tiff::encoder::colortype::RGB8>(8, 6, image)
                .unwrap();
        }
    }
    // Two frames in the container that animations have.
    let still = encode(picture(), ImageFormat::WebP);
    let chunk = |name: &[u8; 4], data: &[u8]| {
        let mut chunk = [&name[..], &(data.len() as u32).to_le_bytes(), data].concat();
        chunk.resize(chunk.len().next_multiple_of(2), 0);
        chunk
    };
    let extended = chunk(b"VP8X", &[2, 0, 0, 0, 7, 0, 0, 5, 0, 0]);
    let frame = |image: &[u8]| {
        let place = [0, 0, 0, 0, 0, 0, 7, 0, 0, 5, 0, 0, 100, 0, 0, 0];
        chunk(b"ANMF", &[&place[..], &image[12..]].concat())
    };
    let frames = frame(&still).repeat(2);
    let body = [b"WEBP", &extended[..], &chunk(b"ANIM", &[0; 6]), &frames].concat();
    let webp = chunk(b"RIFF", &body);
    for (bytes, what) in [
        (&gif, "animation"),
        (&apng, "animation"),
        (&webp, "animation"),
        (tiff.get_ref(), "several pages"),
    ] {
        let refused = decode(bytes, 3, Fit::Square(4)).unwrap_err();
        assert!(
            matches!(&refused, Unread::Because(why) if why.contains(what)),
            "{what}: {refused:?}"
        );
        assert!(header(bytes, true).unwrap_err().contains(what));
    }
}

/// A file of each format whose header promises 65,535 pixels in each direction or nearly so.
fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    let mut png = encode(picture(), ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let mut crc = flate2::Crc::new();
    crc.update(&png[12..29]);
    png[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    let mut jpeg = encode(picture(), ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    let mut gif = encode(picture(), ImageFormat::Gif);
    gif[6..10].fill(0xff);
    let mut bmp = encode(picture(), ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0]);
    let mut qoi = encode(picture(), ImageFormat::Qoi);
    qoi[4..12].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let pnm = b"P6\n65535 65535\n255\n12345678".to_vec();
    let mut tiff = Cursor::new(Vec::new());
    {
        // The library's own encoder wants all pixels: so a small one, changed.
        let mut encoder = tiff::encoder::TiffEncoder::new(&mut tiff).unwrap();
        encoder
            .write_image::<tiff::encoder::colortype::RGB8>(8, 6, &picture())
            .unwrap();
    }
    let mut tiff = tiff.into_inner();
    for (tag, value) in [(256u16, 8u32), (257, 6)] {
        let is_tag = |w: &[u8]| w[..2] == tag.to_le_bytes() && w[4..] == [1, 0, 0, 0];
        let at = tiff.windows(8).rposition(is_tag).unwrap();
        let field = &mut tiff[at + 8..at + 12];
        assert_eq!(field[0], value as u8);
        field.copy_from_slice(&[0xff, 0xff, 0, 0]);
    }
    vec![
        ("png", png),
        ("jpeg", jpeg),
        ("gif", gif),
        ("bmp", bmp),
        ("qoi", qoi),
        ("pnm", pnm),
        ("tiff", tiff),
    ]
}

#[test]
fn large_promises_take_no_memory() {
    for (name, bomb) in bombs() {
        for fit in [Fit::Exact(SIZE), Fit::Square(8)] {
            let refused = decode(&bomb, 3, fit).unwrap_err();
            let told = match &refused {
                Unread::Size([65_535, 65_535]) => fit == Fit::Exact(SIZE),
                Unread::Because(why) => {
                    // These two find the promise impossible themselves.
                    why.contains("more than 512 MiB") || ["qoi", "tiff"].contains(&name)
                }
                _ => false,
            };
            assert!(told, "{name}: {refused:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// No damage makes it panic, or take the memory that a header promises.
    #[test]
    fn damage_is_an_error_or_another_picture(
        kind in 0..EVERY.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = encode(picture(), EVERY[kind].0);
        for (index, byte) in flips {
            let i = index.index(bytes.len());
            bytes[i] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = header(&bytes, true);
        let _ = header(&bytes, false);
        let _ = file::beside_pixels(&bytes);
        let _ = decode(&bytes, 3, Fit::Exact(SIZE));
        if header(&bytes, true).is_ok_and(|h| h.height * h.width < 1 << 20) {
            let square = decode(&bytes, 3, Fit::Square(4));
            prop_assert!(square.is_err() || square.is_ok_and(|levels| levels.len() == 48));
        }
    }
}
