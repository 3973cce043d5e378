//! Compressed images: their index, and streams under a small model.
#![no_main]

use std::io::Cursor;
use std::ops::ControlFlow;
use std::sync::LazyLock;

use pixelcnn::ModelConfig;
use pixelcnn::archive::{Archive, CodingModel};
use pixelcnn::network::draw_parameters;

static MODEL: LazyLock<CodingModel> = LazyLock::new(|| {
    let config = ModelConfig {
        height: 4,
        width: 4,
        channels: 1,
        nr_resnet: 1,
        nr_filters: 1,
        nr_logistic_mix: 1,
        ..ModelConfig::default()
    };
    CodingModel::new(&config, &draw_parameters(&config, 1)).expect("a model")
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(mut archive) = Archive::new(Cursor::new(bytes)) {
        let first: Vec<usize> = (0..archive.entries().len().min(4)).collect();
        let _ = archive.read(&MODEL, &first, &mut |_| ControlFlow::Continue(()));
    }
});
