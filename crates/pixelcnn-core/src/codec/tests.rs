//! Images through the coder and back: what it costs, and that nothing changes a byte.

use std::ops::Range;

use super::stream::{Decoder, Encoder};
use super::*;
use crate::config::ModelConfig;
use crate::kernels::simd;
use crate::likelihood::{ChannelMixture, from_level};
use crate::suite::{Images, configs, parameters};
use constriction::stream::model::DecoderModel;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Between -1 and 1.
fn uniform(random: &mut ChaCha8Rng) -> f32 {
    random.next_u32() as i32 as f32 / 2f32.powi(31)
}

/// Values drawn from random mixtures, with the mixtures and their frequencies.
fn values(random: &mut ChaCha8Rng, count: usize) -> Vec<(u8, ChannelMixture, Frequencies)> {
    let value = |_| {
        let components = 1 + random.next_u32() as usize % 11;
        let mut parameter = |scale: f32, offset: f32| -> Vec<f32> {
            let values = (0..components).map(|_| scale * uniform(random) + offset);
            values.collect()
        };
        let one = ChannelMixture {
            log_weights: parameter(2.0, 0.0),
            means: parameter(1.2, 0.0),
            log_scales: parameter(2.5, -3.0),
        };
        let mut frequencies = Frequencies::default();
        frequencies.set(&one);
        let (level, ..) = frequencies.quantile_function(random.next_u32() >> 8);
        (level, one, frequencies)
    };
    (0..count).map(value).collect()
}

#[test]
fn the_cost_is_the_likelihood() {
    let values = values(&mut ChaCha8Rng::seed_from_u64(1), 30_000);
    let mut encoder = Encoder::new();
    let mut nats = 0.0;
    for (level, one, frequencies) in &values {
        encoder.encode(*level, frequencies);
        nats -= f64::from(one.log_prob(from_level(*level)));
    }
    let (bits, likelihood) = (8.0 * encoder.finish().len() as f64, nats / 2f64.ln());
    assert!(bits > 100_000.0, "{bits}");
    assert!(
        bits - likelihood < 1e-4 * likelihood + 8.0,
        "{bits}, {likelihood}"
    );
    assert!(
        likelihood - bits < 1e-4 * likelihood + 8.0,
        "{bits}, {likelihood}"
    );
}

/// What a decoder makes of a stream, and whether it finds it whole.
fn decoded(stream: &[u8], values: &[(u8, ChannelMixture, Frequencies)]) -> (Vec<u8>, bool) {
    let mut decoder = Decoder::new(stream);
    let levels = values.iter().map(|(_, _, f)| decoder.decode(f)).collect();
    (levels, decoder.finish())
}

/// The bytes taken for a big-endian number and `add` added to it, where it stays one of as many.
fn plus(bytes: &[u8], add: i32) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let mut carry = add;
    for byte in bytes.iter_mut().rev() {
        let sum = i32::from(*byte) + carry;
        *byte = sum.rem_euclid(256) as u8;
        carry = sum.div_euclid(256);
    }
    (carry == 0).then_some(bytes)
}

/// Many short streams, so that all ways to end occur.
#[test]
fn a_stream_is_the_shortest_and_the_only_one() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for round in 0..3_000 {
        let count = round % 12;
        let values = values(&mut random, count);
        let levels: Vec<u8> = values.iter().map(|(level, ..)| *level).collect();
        let mut encoder = Encoder::new();
        for (level, _, frequencies) in &values {
            encoder.encode(*level, frequencies);
        }
        let stream = encoder.finish();
        assert_eq!(decoded(&stream, &values), (levels.clone(), true));
        // With a byte less there are two that could be it.
        if let Some((_, shorter)) = stream.split_last() {
            for shorter in [Some(shorter.to_vec()), plus(shorter, 1)]
                .into_iter()
                .flatten()
            {
                assert_ne!(decoded(&shorter, &values).0, levels);
            }
        }
        let mut others = vec![
            [&stream[..], &[0]].concat(),
            [&stream[..], &[1]].concat(),
            [&stream[..], &[0; 9], &[1]].concat(),
        ];
        others.extend(plus(&stream, 1));
        others.extend(plus(&stream, -1).filter(|_| !stream.is_empty()));
        for other in others.into_iter().filter(|other| *other != stream) {
            assert_ne!(
                decoded(&other, &values),
                (levels.clone(), true),
                "{other:?}"
            );
        }
    }
}

fn codec(evaluator: &Evaluator, level: Level, threads: usize) -> Codec {
    Codec {
        evaluator: evaluator.clone(),
        level,
        threads,
    }
}

fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn encode(codec: &Codec, images: &Images, range: Range<usize>) -> Vec<Vec<u8>> {
    let dims = codec.evaluator.config().dims();
    let levels = &images.levels[range.start * dims..range.end * dims];
    let streams = codec.encode(&images.labels[range], levels, &mut go_on);
    streams.unwrap()
}

fn decode(codec: &Codec, labels: &[u32], streams: &[Vec<u8>]) -> Vec<Option<Vec<u8>>> {
    let streams: Vec<&[u8]> = streams.iter().map(Vec::as_slice).collect();
    codec.decode(labels, &streams, &mut go_on).unwrap()
}

/// A model and images, some of them of one colour.
fn case(config: &ModelConfig, n: usize, seed: u64) -> (Evaluator, Images) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let parameters = parameters(config, &mut random);
    let mut images = Images::random(config, n, &mut random);
    for (i, image) in images.levels.chunks_exact_mut(config.dims()).enumerate() {
        match i % 4 {
            1 => image.fill(255 * (i / 4 % 2) as u8),
            2 => image.fill(random.next_u32() as u8),
            _ => {}
        }
    }
    (Evaluator::new(config, &parameters).unwrap(), images)
}

#[test]
fn neighbours_threads_and_vectors_do_not_change_a_byte() {
    for (seed, config) in configs().into_iter().enumerate() {
        let (evaluator, images) = case(&config, 64, seed as u64);
        let streams = encode(&codec(&evaluator, simd::level(), 1), &images, 0..64);
        let ways = [
            (Level::Avx512, 0..64, 2),
            (Level::Avx512, 3..10, 2),
            (Level::Avx2, 3..10, 1),
            (Level::Avx2, 5..6, 2),
            (Level::Plain, 3..10, 2),
            (Level::Plain, 5..6, 1),
        ];
        for (level, range, threads) in ways {
            if level > simd::level() {
                continue;
            }
            let codec = codec(&evaluator, level, threads);
            assert_eq!(
                encode(&codec, &images, range.clone()),
                streams[range.clone()]
            );
            let labels = &images.labels[range.clone()];
            let decoded = decode(&codec, labels, &streams[range.clone()]);
            let originals = images.levels.chunks_exact(config.dims());
            for (decoded, original) in decoded.iter().zip(originals.skip(range.start)) {
                assert_eq!(
                    decoded.as_deref(),
                    Some(original),
                    "{level:?}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn damage_is_noticed_and_stays_where_it_is() {
    let config = &configs()[1];
    let (evaluator, images) = case(config, 3, 7);
    let codec = codec(&evaluator, simd::level(), 1);
    let whole = encode(&codec, &images, 0..3);
    let originals: Vec<&[u8]> = images.levels.chunks_exact(config.dims()).collect();
    let mut damaged: Vec<Vec<u8>> = (0..whole[0].len())
        .map(|n| whole[0][..n].to_vec())
        .collect();
    for bit in 0..8 * whole[0].len() {
        let mut flipped = whole[0].clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        damaged.push(flipped);
    }
    damaged.extend([vec![255; 100], vec![128; 3], [&whole[0][..], &[1]].concat()]);
    let (mut refused, all) = (0, damaged.len());
    for stream in damaged {
        let streams = [stream, whole[1].clone(), whole[2].clone()];
        let decoded = decode(&codec, &images.labels, &streams);
        assert_ne!(decoded[0].as_deref(), Some(originals[0]));
        assert_eq!(decoded[1].as_deref(), Some(originals[1]));
        assert_eq!(decoded[2].as_deref(), Some(originals[2]));
        refused += usize::from(decoded[0].is_none());
    }
    // Of the others the checksums of callers tell.
    assert!(refused > all / 2, "{refused} of {all}");
}

#[test]
fn progress_is_told_and_can_stop() {
    let config = &configs()[0];
    let (evaluator, images) = case(config, 2, 8);
    let codec = codec(&evaluator, simd::level(), 1);
    let mut rows = Vec::new();
    let mut three = |row| {
        rows.push(row);
        match row {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let stopped = codec.encode(&images.labels, &images.levels, &mut three);
    assert_eq!(stopped, Err(CodecError::Stopped(Stopped)));
    assert_eq!(rows, [1, 2, 3]);
    let stopped = codec.decode(&[0], &[&[]], &mut |_| ControlFlow::Break(()));
    assert_eq!(stopped, Err(CodecError::Stopped(Stopped)));
    let none: [Vec<u8>; 0] = [];
    assert_eq!(codec.encode(&[], &[], &mut go_on).unwrap(), none);
}

/// Pictures of many sizes side by side, of all channels and of one.
fn pictures(random: &mut ChaCha8Rng, config: &ModelConfig) -> Vec<(Shape, Vec<u8>)> {
    let sizes = [
        [1, 1],
        [3, 30],
        [150, 5],
        [64, 12],
        [65, 13],
        [9, 70],
        [2, 12],
    ];
    let picture = |(number, [height, width]): (usize, [usize; 2])| {
        let shape = Shape {
            height,
            width,
            channels: if number % 3 == 1 { 1 } else { config.channels },
            class: number as u32 % 2,
        };
        let mut level = random.next_u32() as u8;
        let levels = (0..shape.dims()).map(|_| {
            level = level.wrapping_add((random.next_u32() % 9) as u8);
            level
        });
        (shape, levels.collect())
    };
    sizes.into_iter().enumerate().map(picture).collect()
}

fn in_strips(config: &ModelConfig, columns: usize, seed: u64) -> Codec {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let config = config.resized([1, columns]);
    Codec {
        evaluator: Evaluator::new(&config, &parameters(&config, &mut random)).unwrap(),
        level: simd::level(),
        threads: 2,
    }
}

#[test]
fn pictures_of_any_size_come_back() {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    // RGB, grey with classes, channels one after another.
    for (kind, columns, adapts) in [(0, 12, true), (1, 4, true), (6, 32, true), (0, 12, false)] {
        let coding = Coding {
            cut: Cut::Strips,
            adapts,
        };
        let config = &configs()[kind];
        let codec = in_strips(config, columns, 9);
        let pictures = pictures(&mut random, config);
        let shapes: Vec<Shape> = pictures.iter().map(|(shape, _)| *shape).collect();
        let given: Vec<(Shape, &[u8])> = pictures
            .iter()
            .map(|(shape, levels)| (*shape, &levels[..]))
            .collect();
        let encode = |codec: &Codec, given: &[(Shape, &[u8])]| {
            codec
                .encode_pictures(coding, given, &mut |_, _| ControlFlow::Continue(()))
                .unwrap()
        };
        let tiles = encode(&codec, &given);
        for (shape, tiles) in shapes.iter().zip(&tiles) {
            assert_eq!(tiles.len(), shape.tiles(columns).len());
        }
        // The same bytes for each alone, and with other threads and vectors.
        let plain = Codec {
            level: Level::Plain,
            threads: 1,
            ..codec.clone()
        };
        for (number, picture) in given.iter().enumerate() {
            assert_eq!(encode(&plain, &[*picture]), [tiles[number].clone()]);
        }
        let decode = |codec: &Codec, streams: &dyn Fn(usize, usize) -> Option<Vec<u8>>| {
            let mut next = vec![0; shapes.len()];
            let mut stream = |picture: usize, tile: usize| {
                assert_eq!(tile, next[picture]);
                next[picture] += 1;
                streams(picture, tile)
            };
            let progress = &mut |_, _| ControlFlow::Continue(());
            codec
                .decode_pictures(coding, &shapes, &mut stream, progress)
                .unwrap()
        };
        let whole = |picture: usize, tile: usize| Some(tiles[picture][tile].clone());
        for codec in [&codec, &plain] {
            for (got, (_, want)) in decode(codec, &whole).iter().zip(&pictures) {
                assert_eq!(got.as_ref(), Some(want));
            }
        }
        // Without a tile, or with another one, that picture is lost, or another one.
        let others = |damaged: &[Option<Vec<u8>>]| {
            assert_ne!(damaged[2].as_ref(), Some(&pictures[2].1));
            for (number, (_, want)) in pictures.iter().enumerate() {
                assert!(number == 2 || damaged[number].as_ref() == Some(want));
            }
        };
        let lost = decode(&codec, &|picture, tile| {
            whole(picture, tile).filter(|_| (picture, tile) != (2, 1))
        });
        assert_eq!(lost[2], None);
        others(&lost);
        others(&decode(&codec, &|picture, tile| {
            let mut stream = whole(picture, tile)?;
            if (picture, tile) == (2, 0) {
                stream[3] ^= 8;
            }
            Some(stream)
        }));
    }
}

#[test]
fn tiles_begin_in_the_order_of_the_wave() {
    let shape = Shape {
        height: 130,
        width: 70 * 4,
        channels: 3,
        class: 0,
    };
    let tiles = shape.tiles(4);
    let tiles: Vec<[usize; 2]> = tiles.iter().map(|tile| [tile.band, tile.strip]).collect();
    assert_eq!(tiles.len(), 70 * 3);
    assert_eq!(tiles[..3], [[0, 0], [0, 1], [0, 2]]);
    // The seventeenth strip begins with the second tile of the first one.
    assert_eq!(tiles[15..19], [[0, 15], [1, 0], [0, 16], [1, 1]]);
    let stopped = in_strips(&configs()[0], 4, 1).encode_pictures(
        Coding {
            cut: Cut::Strips,
            adapts: true,
        },
        &[(
            Shape {
                height: 9,
                width: 9,
                ..shape
            },
            &[7; 243],
        )],
        &mut |done, rows| match (done, rows) {
            (2, 17) => ControlFlow::Break(()),
            (1, 17) => ControlFlow::Continue(()),
            _ => unreachable!("{done} of {rows}"),
        },
    );
    assert!(matches!(stopped, Err(CodecError::Stopped(_))));
}
