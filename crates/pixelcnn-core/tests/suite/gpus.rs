//! What every GPU's engine must do beside.

#![allow(dead_code)] // The CPU's has no use for it.

use pixelcnn_core::engine::{Batch, Engine, EngineError, Update};
use pixelcnn_core::incremental::gpu::{GpuEvaluator, Prepared};
use pixelcnn_core::ranks::{Alone, Sharing};
use pixelcnn_core::{ModelConfig, Nonlinearity, reference};
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::{
    DROPOUT, Images, Make, as_they_are, assert_close, batch, configs, norm, parameters, state,
    widened,
};

/// Forced through a GPU's evaluator, images have the logits that the network gives for whole maps.
pub fn pixel_by_pixel_it_is_the_reference(
    make: fn(Prepared) -> Result<GpuEvaluator, EngineError>,
    configs: &[ModelConfig],
) {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for config in configs {
        let parameters = parameters(config, &mut random);
        let images = Images::random(config, 3, &mut random);
        let evaluator = make(Prepared::new(config, &parameters).unwrap()).unwrap();
        let batch = as_they_are(&images);
        let want = reference::run(config, &widened(&parameters), batch, None).unwrap();
        let mut raster = evaluator.begin(&images.labels).unwrap();
        raster.give_coarse(&images.levels).unwrap();
        let (pixels, output) = (config.height * config.width, config.output_channels());
        let mut got = vec![0.0; want.logits.len()];
        while let Some([y, x]) = raster.position() {
            let (pixel, channels) = (y * config.width + x, raster.channels());
            for (image, logits) in raster.logits().unwrap().chunks_exact(output).enumerate() {
                got[(image * pixels + pixel) * output..][..output].copy_from_slice(logits);
            }
            let levels = images.levels.chunks_exact(config.bytes_per_image());
            let due = config.bytes_of(channels);
            let levels =
                levels.flat_map(|image| &image[pixel * config.bytes_per_pixel()..][due.clone()]);
            raster.push(&levels.copied().collect::<Vec<_>>()).unwrap();
        }
        let length = norm(want.logits.iter().copied());
        assert_close("logits", &got, &want.logits, 2e-6, length);

        let wrong = evaluator.begin(&[99]);
        assert_eq!(wrong.is_err(), config.nr_classes > 0);
    }
}

/// As many images are evaluated at a time as there is memory for, with the same bits; a batch to
/// train on must fit whole. `little` makes engines whose memory has no room for 30 images.
pub fn little_memory_is_enough_or_said_to_be_too_little(make: Make, little: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let config = &configs()[0];
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 30, &mut random);
    let batch = batch(&images);
    let evaluated = |make: Make| {
        let mut engine = make(config).unwrap();
        engine.load_weights(&parameters).unwrap();
        (
            engine.logits(batch).unwrap(),
            engine.nats_per_image(batch).unwrap(),
            engine.nats_per_pixel(batch).unwrap(),
            engine.feature_maps(batch).unwrap(),
        )
    };
    assert!(evaluated(make) == evaluated(little));

    let mut engine = little(config).unwrap();
    let Err(EngineError::Memory { room: before, .. }) = engine.expect_room(30) else {
        panic!("30 images will not fit");
    };
    engine.load(state(&parameters)).unwrap();
    let Err(EngineError::Memory { images: 30, room }) = engine.backward(batch, None) else {
        panic!("30 images do not fit");
    };
    assert!((1..30).contains(&room), "{room}");
    assert!(room.abs_diff(before) <= 1, "{before}, {room}");
    let fits = Batch {
        images: &images.levels[..room * config.dims()],
        labels: &images.labels[..room],
        ..Batch::default()
    };
    engine.step(fits, None, &Update::default()).unwrap();
}

/// A batch in shards is the whole batch.
pub fn shards_are_one_batch(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let config = &configs()[1];
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 8, &mut random);
    let gradients = |shards: usize| {
        let mut engine = make(config).unwrap();
        engine.load(state(&parameters)).unwrap();
        let sharing = Sharing::new(Arc::new(Alone), 8, shards).unwrap();
        engine.share((shards > 1).then_some(sharing)).unwrap();
        let nats = engine.backward(batch(&images), Some(DROPOUT)).unwrap();
        (nats, engine.gradients().unwrap())
    };
    let (whole, want) = gradients(1);
    let want = widened(&want);
    let length = norm(want.iter().flatten().copied());
    for shards in [2, 4, 8] {
        let (nats, got) = gradients(shards);
        assert!((nats / whole - 1.0).abs() < 1e-6, "{nats}, {whole}");
        for (got, want) in got.iter().zip(&want) {
            assert_close("gradient", got, want, 1e-5, length);
        }
    }
}

/// Whatever an engine did in between, a step is taken on the images that it is given.
pub fn what_was_done_before_does_not_matter(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(10);
    let config = &configs()[0];
    let parameters = parameters(config, &mut random);
    let few = Images::random(config, 4, &mut random);
    let others = Images::random(config, 4, &mut random);
    let many = Images::random(config, 8, &mut random);
    let fresh = |images: &Images| {
        let mut engine = make(config).unwrap();
        engine.load(state(&parameters)).unwrap();
        (
            engine.backward(batch(images), None).unwrap(),
            engine.gradients().unwrap(),
        )
    };
    let want = fresh(&others);
    let mut engine = make(config).unwrap();
    engine.load(state(&parameters)).unwrap();
    let check = |engine: &mut dyn Engine| {
        let nats = engine.backward(batch(&others), None).unwrap();
        assert!((nats, engine.gradients().unwrap()) == want);
    };
    engine.backward(batch(&few), None).unwrap();
    engine.expect_room(8).unwrap();
    check(&mut *engine);
    engine.load_weights(&parameters).unwrap();
    engine.logits(batch(&many)).unwrap();
    check(&mut *engine);
    engine.load_weights(&parameters).unwrap();
    engine.logits(batch(&few)).unwrap();
    engine.expect_room(8).unwrap();
    check(&mut *engine);
    engine.backward(batch(&many), None).unwrap();
    check(&mut *engine);
}

/// What is no number stays none, whatever it goes through.
pub fn no_number_goes_through(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for nonlinearity in [
        Nonlinearity::ConcatElu,
        Nonlinearity::Elu,
        Nonlinearity::Relu,
    ] {
        let config = ModelConfig {
            nonlinearity,
            ..configs()[0].clone()
        };
        let mut broken = parameters(&config, &mut random);
        broken[2].fill(f32::NAN);
        let images = Images::random(&config, 2, &mut random);
        let mut engine = make(&config).unwrap();
        engine.load_weights(&broken).unwrap();
        let nats = engine.nats_per_image(batch(&images)).unwrap();
        assert!(nats.iter().all(|nats| nats.is_nan()), "{nats:?}");
    }
}
