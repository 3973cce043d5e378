//! The evaluator against the reference, which takes whole maps in double precision; and against
//! itself, bit for bit.

use super::*;
use crate::reference;
use crate::suite::{Images, as_they_are, configs, configs_of_codes, configs_of_energy, parameters};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// The levels of the images' pixel with one number that are due, \[images, channels\].
fn due(images: &Images, config: &ModelConfig, range: Range<usize>, raster: &Raster) -> Vec<u8> {
    let [y, x] = raster.position().unwrap();
    let pixel = (y * config.width + x) * config.bytes_per_pixel();
    let levels = |image: usize| {
        let at = image * config.bytes_per_image() + pixel;
        let due = config.bytes_of(raster.channels());
        images.levels[at + due.start..at + due.end].iter().copied()
    };
    range.flat_map(levels).collect()
}

/// Forces some of the images through an evaluator: their logits \[pixels, images, output\].
fn forced(
    evaluator: &Evaluator,
    level: Level,
    threads: usize,
    images: &Images,
    range: Range<usize>,
) -> Vec<Vec<f32>> {
    let config = evaluator.config();
    let labels = &images.labels[range.clone()];
    let mut raster = evaluator.begin_at(level, labels, threads).unwrap();
    let bytes = config.bytes_per_image();
    raster
        .give_coarse(&images.levels[range.start * bytes..range.end * bytes])
        .unwrap();
    let mut all = Vec::new();
    while raster.position().is_some() {
        let logits = raster.logits().to_vec();
        // With the last of a pixel's channels all logits are there.
        if raster.channels().end == config.channels {
            all.push(logits);
        }
        raster.push(&due(images, config, range.clone(), &raster));
    }
    assert_eq!(all.len(), config.height * config.width);
    all
}

#[test]
fn logits_are_those_of_the_network_written_plainly() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for config in [configs(), configs_of_codes(), configs_of_energy()].concat() {
        let parameters = parameters(&config, &mut random);
        let evaluator = Evaluator::new(&config, &parameters).unwrap();
        let images = Images::random(&config, 3, &mut random);
        let got = forced(&evaluator, simd::level(), 2, &images, 0..3);
        let output = config.output_channels();
        let wide = parameters.iter().map(|values| {
            let values = values.iter().copied();
            values.map(f64::from).collect::<Vec<_>>()
        });
        let batch = as_they_are(&images);
        let plain = reference::run(&config, &wide.collect::<Vec<_>>(), batch, None).unwrap();
        let size = config.height * config.width * output;
        for (image, want) in plain.logits.chunks_exact(size).enumerate() {
            let scale = want.iter().fold(0.0f64, |max, v| max.max(v.abs()));
            assert!(scale > 0.1, "{scale}");
            for (pixel, want) in want.chunks_exact(output).enumerate() {
                let got = &got[pixel][image * output..][..output];
                for (got, want) in got.iter().zip(want) {
                    let difference = (f64::from(*got) - want).abs();
                    assert!(
                        difference < 3e-6 * scale,
                        "{config:?}, pixel {pixel}: {got}, {want}"
                    );
                }
            }
        }
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn neighbours_threads_and_vectors_do_not_change_a_bit() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for config in [configs(), configs_of_codes(), configs_of_energy()].concat() {
        let parameters = parameters(&config, &mut random);
        let evaluator = Evaluator::new(&config, &parameters).unwrap();
        let images = Images::random(&config, 64, &mut random);
        let output = config.output_channels();
        let want = forced(&evaluator, simd::level(), 1, &images, 0..64);
        let ways = [
            (Level::Avx512, 0..64, 2),
            (Level::Avx512, 3..10, 2),
            (Level::Avx512, 0..50, 3),
            (Level::Avx2, 3..10, 1),
            (Level::Avx2, 5..6, 2),
            (Level::Plain, 3..10, 1),
            (Level::Plain, 5..6, 2),
        ];
        for (level, range, threads) in ways {
            if level <= simd::level() {
                let got = forced(&evaluator, level, threads, &images, range.clone());
                for (got, want) in got.iter().zip(&want) {
                    let want = &want[range.start * output..range.end * output];
                    assert_eq!(
                        bits(got),
                        bits(want),
                        "{level:?}, {threads} threads, {range:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_not_asked_for_is_computed_all_the_same() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let config = &configs()[0];
    let evaluator = Evaluator::new(config, &parameters(config, &mut random)).unwrap();
    let images = Images::random(config, 2, &mut random);
    let want = forced(&evaluator, simd::level(), 1, &images, 0..2);
    let mut raster = evaluator.begin(&images.labels, 1).unwrap();
    for _ in 0..config.height * config.width - 1 {
        raster.push(&due(&images, config, 0..2, &raster));
    }
    assert_eq!(
        raster.position(),
        Some([config.height - 1, config.width - 1])
    );
    assert_eq!(raster.logits(), &want[want.len() - 1]);
    assert_eq!(raster.logits(), &want[want.len() - 1]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let config = configs()[1].clone();
    let mut parameters = parameters(&config, &mut random);
    let evaluator = Evaluator::new(&config, &parameters).unwrap();
    let refused = |labels: &[u32]| evaluator.begin(labels, 1).err().unwrap();
    assert_eq!(
        refused(&[0, 3]),
        EvaluatorError::Class {
            class: 3,
            nr_classes: 3
        }
    );
    assert_eq!(evaluator.begin(&[], 2).unwrap().logits(), &[] as &[f32]);

    let empty = ModelConfig {
        height: 0,
        ..config.clone()
    };
    assert!(matches!(
        Evaluator::new(&empty, &parameters),
        Err(EvaluatorError::Config(_))
    ));
    parameters[4].pop();
    let name = Layout::new(&config).parameters[4].name.clone();
    let wrong = Evaluator::new(&config, &parameters).unwrap_err();
    assert!(matches!(wrong, EvaluatorError::Parameters { name: n, .. } if n == name));
    let missing = Evaluator::new(&config, &parameters[..3]).unwrap_err();
    assert!(matches!(
        missing,
        EvaluatorError::Parameters { found: 0, .. }
    ));
}

/// The vertical stack advances by rows and half of the horizontal stack's sums with it.
#[test]
fn only_the_horizontal_stack_is_left_to_the_pixels() {
    let program = Program::new(&ModelConfig::default(), true).unwrap();
    let sums = program.sums.iter();
    let by_row = sums.clone().filter(|sum| sum.by_row).count();
    // Of the vertical stack: the first layer, 4 layers between resolutions, and two sums for each
    // of 15 + 17 blocks.
    assert_eq!(by_row, 1 + 4 + 2 * 32);
    assert_eq!(sums.len(), 2 * by_row + 1);
    let work = |by: fn(&Sum) -> &[program::Tap]| -> usize {
        let taps = |sum: &Sum| by(sum).iter().map(program::Tap::channels).sum::<usize>();
        let blocks = program.sums.iter().filter(|sum| !sum.by_row && sum.gated);
        blocks.map(taps).sum()
    };
    assert_eq!(
        work(|sum| &sum.phases[0].row),
        work(|sum| &sum.phases[0].pixel)
    );
}

/// Strips of pictures side by side: what a strip sees is what lies above and to its left, to its own edge.
#[test]
fn strips_are_those_of_the_network_written_plainly() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let kinds = configs().into_iter().filter(|config| !config.attends());
    for (kind, config) in kinds.filter(|config| config.width > 1).enumerate() {
        let (columns, strips) = ([16, 4, 8][kind % 3], 3);
        let config = config.resized([[6, 13, 4][kind % 3], columns * strips]);
        let parameters = parameters(&config, &mut random);
        let images = Images::random(&config, 2, &mut random);
        let wide: Vec<Vec<f64>> = crate::suite::widened(&parameters);
        let batch = as_they_are(&images);
        let plain = reference::run_in_strips(&config, &wide, batch, None, columns).unwrap();

        let strip = config.resized([1, columns]);
        let evaluator = Evaluator::new(&strip, &parameters).unwrap();
        // Two pictures, the second of which begins later, where another one has been.
        let lane = |picture: usize, strip: usize| Lane {
            start: 8 * picture + strip * LAG,
            rows: config.height,
            left: (strip > 0).then(|| picture * strips + strip - 1),
            class: images.labels[picture],
        };
        let lanes: Vec<Lane> = (0..2)
            .flat_map(|picture| (0..strips).map(move |strip| lane(picture, strip)))
            .collect();
        let rows = 8 + (strips - 1) * LAG + config.height;
        let (output, dims) = (config.output_channels(), config.bytes_per_image());
        let logits = |level: Level, threads: usize| {
            let raster = evaluator.begin_strips(level, &lanes, threads, rows);
            let (mut raster, mut got) = (raster.unwrap(), vec![f32::NAN; plain.logits.len()]);
            while let Some([y, x]) = raster.position() {
                let here = raster.channels();
                let place = |number: usize| {
                    let row = y.checked_sub(lanes[number].start)?;
                    let pixel = row * config.width + number % strips * columns + x;
                    (row < config.height).then_some((number / strips, pixel))
                };
                let mut levels = vec![77; lanes.len() * here.len()];
                let of_lanes = raster.logits().chunks_exact(output);
                let due = of_lanes.zip(levels.chunks_exact_mut(here.len()));
                for (number, (logits, levels)) in due.enumerate() {
                    let Some((picture, pixel)) = place(number) else {
                        continue;
                    };
                    let first = picture * dims + pixel * config.channels;
                    levels.copy_from_slice(&images.levels[first + here.start..first + here.end]);
                    let at = (picture * dims / config.channels + pixel) * output;
                    got[at..at + output].copy_from_slice(logits);
                }
                raster.push_inside(&levels, |number| place(number).is_some());
            }
            got
        };
        let got = logits(simd::level(), 1);
        let scale = plain.logits.iter().fold(0.0f64, |max, v| max.max(v.abs()));
        for (got, want) in got.iter().zip(&plain.logits) {
            let difference = (f64::from(*got) - want).abs();
            assert!(difference < 3e-6 * scale, "{config:?}: {got}, {want}");
        }
        for (level, threads) in [(Level::Plain, 1), (simd::level(), 2), (Level::Plain, 3)] {
            assert_eq!(bits(&logits(level, threads)), bits(&got));
        }
    }
}
