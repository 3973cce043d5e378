//! The current form of TensorFlow's checkpoints: an index and a file of values.
#![no_main]

use std::io::Cursor;

use pixelcnn::weights::{Unsaid, original, tensorflow};

libfuzzer_sys::fuzz_target!(|files: (&[u8], &[u8])| {
    let (index, data) = files;
    let shard = |_, _| Ok(Cursor::new(data));
    if let Ok(tensors) = tensorflow::v2(Cursor::new(index), shard, &mut Vec::new()) {
        let _ = original::state(tensors, &Unsaid::default());
    }
});
