//! Sampling and completion: the incremental evaluator against the parallel network and against
//! one pass per pixel, on real images.

use pixelcnn_core::kernels::simd::{self, Level};
use pixelcnn_core::likelihood::from_level;
use pixelcnn_core::{Augmentation, ModelConfig, Nonlinearity};

use super::*;
use crate::complete::{Completion, complete};
use crate::data::{DataConfig, Dataset, Split};
use crate::device::Device;
use crate::network::{Batch, Network, draw_parameters, initialise};

/// Images of CIFAR-10, u8 [n, 32, 32, 3].
fn cifar10(n: usize) -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");
    let config = DataConfig {
        data: path.into(),
        ..DataConfig::default()
    };
    let data = Dataset::open(&config, Split::Train).unwrap();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let indices: Vec<usize> = (0..n).map(|i| i % data.len()).collect();
    data.read(&indices, &mut images, &mut labels).unwrap();
    images
}

/// Crops of `n` such images with the size and channels of a model.
fn crops(config: &ModelConfig, n: usize) -> Vec<u8> {
    let mut crops = Vec::new();
    for (i, image) in cifar10(n).chunks_exact(32 * 32 * 3).enumerate() {
        let (top, left) = (i % (33 - config.height), 3 * i % (33 - config.width));
        for y in top..top + config.height {
            for x in left..left + config.width {
                crops.extend(&image[(y * 32 + x) * 3..][..config.channels]);
            }
        }
    }
    crops
}

/// Small models of every kind.
fn configs() -> Vec<ModelConfig> {
    let base = ModelConfig {
        height: 8,
        width: 12,
        nr_resnet: 1,
        nr_filters: 6,
        nr_logistic_mix: 3,
        ..ModelConfig::default()
    };
    vec![
        base.clone(),
        ModelConfig {
            height: 12,
            width: 8,
            channels: 1,
            nr_classes: 3,
            nr_resnet: 2,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_filters: 17,
            nr_classes: 2,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Relu,
            channels: 1,
            ..base.clone()
        },
        ModelConfig {
            nr_classes: 2,
            nr_channel_resnet: 1,
            augmentation: Augmentation::Flips,
            ..base.clone()
        },
        ModelConfig {
            nr_classes: 2,
            nr_filters: 6,
            attention: [2, 3, 1],
            ..base
        },
    ]
}

/// The parameters of a model initialised by real images.
fn model(config: &ModelConfig) -> Vec<Vec<f32>> {
    let images = crops(config, 24);
    let classes = config.nr_classes.max(1) as u32;
    let labels: Vec<u32> = (0..24).map(|i| i % classes).collect();
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    let mut parameters = draw_parameters(config, 5);
    initialise(config, &mut parameters, batch, None, &Device::CPU).unwrap();
    parameters
}

fn unheard(_: Drawn) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The logits of images that are forced through an evaluator \[images, pixels, output\].
fn forced(evaluator: &Evaluator, level: Level, threads: usize, batch: Batch) -> Vec<f32> {
    let config = evaluator.config();
    let output = config.output_channels();
    let n = batch.images.len() / config.dims();
    let pixels = config.height * config.width;
    let mut raster = evaluator.begin_at(level, batch.labels, threads).unwrap();
    let mut all = vec![0.0; n * pixels * output];
    while let Some([y, x]) = raster.position() {
        let (pixel, channels) = (y * config.width + x, raster.channels());
        for (image, logits) in raster.logits().chunks_exact(output).enumerate() {
            all[(image * pixels + pixel) * output..][..output].copy_from_slice(logits);
        }
        let images = batch.images.chunks_exact(config.dims());
        let levels = images.flat_map(|image| &image[pixel * config.channels..][channels.clone()]);
        raster.push(&levels.copied().collect::<Vec<u8>>());
    }
    assert_eq!(raster.position(), None);
    all
}

#[test]
fn likelihoods_of_real_images_are_those_of_the_parallel_network() {
    let whole = ModelConfig {
        nr_filters: 20,
        nr_resnet: 1,
        nr_logistic_mix: 5,
        ..ModelConfig::default()
    };
    for config in configs().into_iter().chain([whole]) {
        let parameters = model(&config);
        let network = Network::new(&config, &parameters, &Device::CPU).unwrap();
        let evaluator = Evaluator::new(&config, &parameters).unwrap();
        let images = crops(&config, 5);
        let labels: Vec<u32> = (0..5)
            .map(|i| i % config.nr_classes.max(1) as u32)
            .collect();
        let batch = Batch {
            images: &images,
            labels: &labels,
            ..Batch::default()
        };
        let (got, want) = (
            forced(&evaluator, simd::level(), 2, batch),
            network.logits(batch).unwrap(),
        );
        for (got, want) in got.iter().zip(&want) {
            assert!(
                (got - want).abs() <= 1e-4 * (1.0 + want.abs()),
                "{got}, {want}"
            );
        }
        let x: Vec<f32> = images.iter().map(|&level| from_level(level)).collect();
        let pixels = config.height * config.width;
        let nats = Mixture::of(&config).nats_per_image(pixels, &x, &got);
        for (got, want) in nats.iter().zip(network.nats_per_image(batch).unwrap()) {
            assert!((got / want - 1.0).abs() < 1e-5, "{config:?}: {got}, {want}");
        }
    }
}

/// Draws the same images by one pass of the network for every pixel, over the rows so far, as the
/// original does.
fn sample_by_passes(config: &ModelConfig, parameters: &[Vec<f32>], sampling: &Sampling) -> Vec<u8> {
    let (height, width, channels) = (config.height, config.width, config.channels);
    let mixture = Mixture::of(config);
    let n = sampling.labels.len();
    let pixel = |image| Pixel::new(generator(sampling.seed, Purpose::Sample, image));
    let mut pixels: Vec<Pixel> = (0..n as u64).map(pixel).collect();
    let mut images = vec![0; n * config.dims()];
    for y in 0..height {
        // No pixel depends on the rows below it: they need not be computed.
        let rows = (y + 1).next_multiple_of(4);
        let top = ModelConfig {
            height: rows,
            ..config.clone()
        };
        let top = Network::new(&top, parameters, &Device::CPU).unwrap();
        for at in (0..width * channels).step_by(config.channels_together()) {
            let (x, channel) = (at / channels, at % channels);
            let seen: Vec<u8> = images
                .chunks_exact(config.dims())
                .flat_map(|image| &image[..rows * width * channels])
                .copied()
                .collect();
            let batch = Batch {
                images: &seen,
                labels: &sampling.labels,
                ..Batch::default()
            };
            let logits = top.logits(batch).unwrap();
            for (image, pixel) in pixels.iter_mut().enumerate() {
                let place = (image * rows + y) * width + x;
                let size = config.output_channels();
                let logits = &logits[place * size..][..size];
                if channel == 0 {
                    pixel.begin(mixture, logits, sampling.temperature);
                }
                let target = ((image * height + y) * width + x) * channels;
                for level in &mut images[target + channel..][..config.channels_together()] {
                    *level = pixel.draw(mixture, logits, sampling.temperature);
                    if config.channels_together() < channels {
                        pixel.values[channel] = from_level(*level).into();
                    }
                }
            }
        }
    }
    images
}

#[test]
fn samples_are_those_of_one_pass_per_pixel() {
    for config in configs() {
        let parameters = model(&config);
        let evaluator = Evaluator::new(&config, &parameters).unwrap();
        let sampling = Sampling {
            labels: (0..3)
                .map(|i| i % config.nr_classes.max(1) as u32)
                .collect(),
            temperature: 0.9,
            seed: 11,
            coarse: Vec::new(),
        };
        let drawn = sample(
            &evaluator.clone().into(),
            &sampling,
            0..sampling.labels.len(),
            &mut unheard,
        )
        .unwrap();
        let passes = sample_by_passes(&config, &parameters, &sampling);
        // A value half-way between two levels could be rounded either way; with this seed none is.
        assert_eq!(drawn, passes, "{config:?}");
        let levels: std::collections::HashSet<u8> = drawn.iter().copied().collect();
        assert!(levels.len() > 20, "hardly anything was drawn: {levels:?}");
    }
}

#[test]
fn bits_do_not_depend_on_batch_threads_or_vectors() {
    let config = ModelConfig {
        nr_filters: 8,
        nr_resnet: 1,
        nr_logistic_mix: 2,
        ..ModelConfig::default()
    };
    let evaluator = Evaluator::new(&config, &model(&config)).unwrap();
    let images = cifar10(64);
    let labels = [0; 64];
    let bits = |level, threads, n: usize| -> Vec<u32> {
        let batch = Batch {
            images: &images[..n * config.dims()],
            labels: &labels[..n],
            ..Batch::default()
        };
        let logits = forced(&evaluator, level, threads, batch);
        logits.iter().map(|value| value.to_bits()).collect()
    };
    let want = bits(simd::level(), 2, 64);
    for (level, threads, n) in [
        (Level::Avx512, 1, 64),
        (Level::Avx512, 1, 7),
        (Level::Avx512, 2, 7),
        (Level::Avx512, 2, 1),
        (Level::Avx2, 2, 64),
        (Level::Avx2, 1, 1),
        (Level::Plain, 1, 7),
        (Level::Plain, 2, 1),
    ] {
        if level <= simd::level() {
            let got = bits(level, threads, n);
            assert!(
                got == want[..got.len()],
                "{level:?}, {threads} threads, {n} images"
            );
        }
    }
}

#[test]
fn an_image_does_not_hang_on_those_beside_it() {
    let of_codes = ModelConfig {
        channels: 1,
        nr_codes: 300,
        nr_coarse_codes: 5,
        ..configs()[1].clone()
    };
    for config in [&configs()[1], &of_codes] {
        hangs_on_itself_alone(config);
    }
}

fn hangs_on_itself_alone(config: &ModelConfig) {
    let (size, bytes) = (config.bytes_per_image(), config.bytes_per_pixel());
    let evaluator = Evaluator::new(config, &draw_parameters(config, 7)).unwrap();
    let coarse = |n: u32| -> Vec<u8> {
        let pixels = (0..n as usize * size / bytes).map(|i| [0, 0, (i * 7 % 11 % 5) as u8, 0]);
        match config.nr_coarse_codes {
            0 => Vec::new(),
            _ => pixels.flatten().collect(),
        }
    };
    let sampling = |n: u32| Sampling {
        labels: (0..n).map(|i| i % 3).collect(),
        temperature: 1.0,
        seed: 3,
        coarse: coarse(n),
    };
    // More than are drawn at a time.
    let many = sampling(70);
    let mut last = 0;
    let mut progress = |Drawn {
                            done,
                            total,
                            images,
                        }: Drawn| {
        assert_eq!(total, 70 * config.height * config.width);
        assert_eq!(images.len(), 70 * size);
        assert!(done > last && done <= total);
        last = done;
        ControlFlow::Continue(())
    };
    let drawn = sample(&evaluator.clone().into(), &many, 0..70, &mut progress).unwrap();
    assert_eq!(last, 70 * config.height * config.width);
    let few = sample(&evaluator.clone().into(), &sampling(3), 0..3, &mut unheard).unwrap();
    assert_eq!(few, drawn[..few.len()]);
    let last = sample(&evaluator.clone().into(), &many, 68..70, &mut unheard).unwrap();
    assert_eq!(last, drawn[68 * size..]);

    let rows: Vec<Vec<u8>> = Rows::new(
        &evaluator.clone().into(),
        (66..68).map(|i| many.image(config, i)),
    )
    .unwrap()
    .collect::<Result<_, _>>()
    .unwrap();
    assert_eq!(rows.len(), config.height);
    for (y, row) in rows.iter().enumerate() {
        for (image, row) in (66..68).zip(row.chunks_exact(config.width * bytes)) {
            let at = image * size + y * config.width * bytes;
            assert_eq!(*row, drawn[at..at + config.width * bytes]);
        }
    }

    let stopped = sample(&evaluator.clone().into(), &many, 0..70, &mut |_| {
        ControlFlow::Break(())
    });
    assert_eq!(stopped, Err(DrawError::Stopped(Stopped)));
    let wrong = Sampling {
        labels: vec![3],
        ..many.clone()
    };
    assert!(sample(&evaluator.clone().into(), &wrong, 0..1, &mut unheard).is_err());
    if config.nr_coarse_codes > 0 {
        // What is given comes back behind each code, and codes take more than a byte.
        let given = many.coarse.chunks_exact(4).map(|pixel| &pixel[2..]);
        assert!(drawn.chunks_exact(4).map(|pixel| &pixel[2..]).eq(given));
        assert!(drawn.chunks_exact(4).any(|pixel| pixel[1] > 0));
        let without = Sampling {
            coarse: Vec::new(),
            ..sampling(2)
        };
        let refused = sample(&evaluator.clone().into(), &without, 0..2, &mut unheard);
        assert_eq!(refused, Err(DrawError::Coarse));
    }
}

#[test]
fn completions_keep_what_is_known_and_go_on_from_it() {
    let config = &configs()[0];
    let evaluator = Evaluator::new(config, &model(config)).unwrap();
    let (dims, pixels) = (config.dims(), config.height * config.width);
    let images = crops(config, 2);
    let completion = |known: &dyn Fn(usize) -> bool, variants| Completion {
        images: images.clone(),
        known: (0..pixels).map(known).collect(),
        labels: vec![0; 2],
        variants,
        temperature: 1.0,
        seed: 8,
    };
    let run = |completion: &Completion| {
        complete(&evaluator.clone().into(), completion, &mut unheard).unwrap()
    };

    // All known but one: everything else stays.
    let one = run(&completion(&|pixel| pixel != 30, 3));
    for (i, completed) in one.chunks_exact(dims).enumerate() {
        let original = &images[i / 3 * dims..][..dims];
        assert_eq!(completed[..90], original[..90]);
        assert_eq!(completed[93..], original[93..]);
    }
    assert_ne!(one[..dims], one[dims..2 * dims], "variants differ");

    // The top known: the rest goes on from it, a variant is the same among fewer, and what is drawn
    // can be given back as known.
    let top = |pixel: usize| pixel < 40;
    let four = run(&completion(&top, 4));
    let two = run(&completion(&top, 2));
    for image in 0..2 {
        assert_eq!(
            two[2 * image * dims..][..2 * dims],
            four[4 * image * dims..][..2 * dims]
        );
    }
    let mut given = completion(&|pixel| pixel < 70, 1);
    given.images = [&four[..dims], &four[4 * dims..5 * dims]].concat();
    assert_eq!(run(&given), given.images);

    // What is known later does not change what is drawn before.
    let mut later = completion(&|pixel| top(pixel) || pixel >= 70, 1);
    later.images[70 * 3..dims].fill(255);
    let drawn = run(&later);
    assert_eq!(drawn[..70 * 3], four[..70 * 3]);
    assert_eq!(drawn[70 * 3..dims], later.images[70 * 3..dims]);
    // What is known before does.
    later.images[..40 * 3].fill(0);
    assert_ne!(run(&later)[40 * 3..70 * 3], four[40 * 3..70 * 3]);
}

/// Requests of different users are drawn side by side as each would be alone.
#[test]
fn samples_and_completions_are_drawn_together() {
    let config = &configs()[0];
    let evaluator: Sampler = Evaluator::new(config, &model(config)).unwrap().into();
    let warm = Sampling::of(3, 5);
    let cold = Sampling {
        temperature: 0.4,
        ..Sampling::of(2, 6)
    };
    let pixels = config.height * config.width;
    let completion = |seed, from: usize| Completion {
        images: crops(config, 2),
        known: (0..pixels).map(|pixel| pixel < from).collect(),
        labels: vec![0; 2],
        variants: 2,
        temperature: 1.1,
        seed,
    };
    let (upper, most) = (completion(7, 30), completion(8, pixels - 9));
    let together = [
        warm.image(config, 2),
        upper.variant(config, 1, 1),
        cold.image(config, 0),
        most.variant(config, 0, 1),
        warm.image(config, 0),
    ];
    let rows: Vec<Vec<u8>> = Rows::new(&evaluator, together)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let row = config.width * config.channels;
    let drawn = |image: usize| -> Vec<u8> {
        let rows = rows.iter().map(|rows| &rows[image * row..][..row]);
        rows.flatten().copied().collect()
    };
    let of = |images: &[u8], i: usize| images[i * config.dims()..][..config.dims()].to_vec();
    let [warm, cold] = [(warm, 3), (cold, 2)]
        .map(|(sampling, n)| sample(&evaluator, &sampling, 0..n, &mut unheard).unwrap());
    let [upper, most] =
        [upper, most].map(|completion| complete(&evaluator, &completion, &mut unheard).unwrap());
    assert_eq!(drawn(0), of(&warm, 2));
    assert_eq!(drawn(1), of(&upper, 3));
    assert_eq!(drawn(2), of(&cold, 0));
    assert_eq!(drawn(3), of(&most, 1));
    assert_eq!(drawn(4), of(&warm, 0));
}
