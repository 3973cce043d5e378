//! PyTorch's state dicts, in both forms.
#![no_main]

use std::io::Cursor;

use pixelcnn::weights::{Unsaid, original, port, pytorch};

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    let tensors = pytorch::read(Cursor::new(file), &mut Vec::new()).and_then(port::to_original);
    if let Ok(tensors) = tensors {
        let _ = original::state(tensors, &Unsaid::default());
    }
});
