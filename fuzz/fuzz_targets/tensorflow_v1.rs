//! The older form of TensorFlow's checkpoints.
#![no_main]

use std::io::Cursor;

use pixelcnn::weights::{Unsaid, original, tensorflow};

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    if let Ok(tensors) = tensorflow::v1(Cursor::new(file), &mut Vec::new()) {
        let _ = original::state(tensors, &Unsaid::default());
    }
});
