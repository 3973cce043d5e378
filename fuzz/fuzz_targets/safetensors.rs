//! safetensors with a `config.json` beside it.
#![no_main]

use std::fs;

use pixelcnn::weights::{Unsaid, hub};

libfuzzer_sys::fuzz_target!(|files: (&[u8], &[u8])| {
    let (config, weights) = files;
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let path = folder.path().join("model.safetensors");
    let written = fs::write(folder.path().join("config.json"), config)
        .and_then(|()| fs::write(&path, weights));
    if written.is_ok() {
        let _ = hub::import(&path, &Unsaid::default());
    }
});
